package configfile

func byDefault(program, name string) string { return "/etc/" + program + "/" + name }
