package commandline

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

func testApp() *cli.Command {
	return Complete(&cli.Command{Name: "app", Flags: []cli.Flag{&cli.StringFlag{Name: "root"}}, Commands: []*cli.Command{
		{Name: "keys", HideHelpCommand: true, Commands: []*cli.Command{
			{Name: "show", Flags: []cli.Flag{&cli.BoolFlag{Name: "json"}, &cli.StringFlag{Name: "dir", Aliases: []string{"d"}}}},
			{Name: "revoke", Flags: []cli.Flag{&cli.StringFlag{Name: "identity", Required: true}}},
		}},
		{Name: "verify", Flags: []cli.Flag{&cli.StringSliceFlag{Name: "since"}}},
	}})
}

func TestArguments(t *testing.T) {
	for line, want := range map[string]string{
		"":                                    "",
		"keys show team-a":                    "keys show -- team-a",
		"keys show team-a --json --dir x":     "keys show --json --dir x -- team-a",
		"keys show --json team-a -d x":        "keys show --json -d x -- team-a",
		"keys show team-a --dir=x":            "keys show --dir=x -- team-a",
		"keys show a -- --json":               "keys show -- a --json",
		"keys show -- -x":                     "keys show -- -x",
		"keys show - --json":                  "keys show --json -- -",
		"keys show help":                      "keys show -- help",
		"verify a b --since x --since - c":    "verify --since x --since - -- a b c",
		"--root r keys show a --json":         "--root r keys show --json -- a",
		"keys revoke team-a --identity i":     "keys revoke --identity i -- team-a",
		"keys revoke --help":                  "keys revoke --help",
		"keys show a -h":                      "keys show --help",
		"keys --help":                         "keys --help",
		"help keys":                           "help keys",
		"--version":                           "--version",
		"keys sho --generate-bash-completion": "keys sho --generate-shell-completion",
	} {
		got, err := arguments(testApp(), append([]string{"app"}, strings.Fields(line)...))
		if err != nil || !slices.Equal(got, append([]string{"app"}, strings.Fields(want)...)) {
			t.Errorf("%s: %q, %v, want %s", line, got, err, want)
		}
	}
	for line, want := range map[string]string{
		"kyes":                     `unknown command "kyes": did you mean keys? (see "app --help")`,
		"keys shwo a":              `keys: unknown command "shwo": did you mean show? (see "app keys --help")`,
		"keys show a --json=":      `keys show: --json= needs true or false (see "app keys show --help")`,
		"keys -- other":            `keys: unknown command "other" (see "app keys --help")`,
		"keys help":                `keys: unknown command "help" (see "app keys --help")`,
		"nothing":                  `unknown command "nothing" (see "app --help")`,
		"vry":                      `unknown command "vry" (see "app --help")`,
		"keys show a --jsn":        `keys show: unknown flag --jsn: did you mean --json? (see "app keys show --help")`,
		"keys show --password=pwd": `keys show: unknown flag --password (see "app keys show --help")`,
		"keys show a --dir":        `keys show: --dir needs a value (see "app keys show --help")`,
		"keys revoke team-a":       `keys revoke: --identity is required (see "app keys revoke --help")`,
		"--rot x keys":             `unknown flag --rot: did you mean --root? (see "app --help")`,
	} {
		got, err := arguments(testApp(), append([]string{"app"}, strings.Fields(line)...))
		if err == nil || err.Error() != want || exit.Status(err) != exit.Usage {
			t.Errorf("%s: %q, %v, want %s", line, got, err, want)
		}
	}
}

func TestWhen(t *testing.T) {
	now := time.Date(2029, 12, 31, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Time{
		"90d":                       now.Add(90 * day),
		"1d12h":                     now.Add(36 * time.Hour),
		"30m":                       now.Add(30 * time.Minute),
		"0s":                        now,
		"2030-01-01":                now.Add(12 * time.Hour),
		"2029-12-31T14:00:00+01:00": now.Add(time.Hour),
	} {
		w := After(time.Hour)
		if err := w.Set(value); err != nil || !w.At(now).Equal(want) {
			t.Errorf("%s: %v, %v, want %v", value, w.At(now), err, want)
		}
		if d, err := w.Until(now); err != nil || d != want.Sub(now) {
			t.Errorf("%s: %v away, %v", value, d, err)
		}
		again := &When{}
		if err := again.Set(w.String()); err != nil || !again.At(now).Equal(want) {
			t.Errorf("%s is written as %s: %v", value, w, err)
		}
	}
	for _, value := range []string{"", "90", "-1d", "d", "1.5d", "-3h", "soon", "2030-13-01", "2030-01-01T00:00", "100001d"} {
		if err := new(When).Set(value); err == nil || !strings.Contains(err.Error(), "90d") {
			t.Errorf("%q: %v", value, err)
		}
	}
	past := &When{}
	if err := past.Set("2029-12-31"); err != nil {
		t.Fatal(err)
	}
	if _, err := past.Until(now); err == nil {
		t.Error("a date in the past is away")
	}
}
