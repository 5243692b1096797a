package install

import (
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
)

func TestTemplateIsRecognized(t *testing.T) {
	const lines = "[proxy_plugins.pilot]\ntype = 'diff'\naddress = '" + containerd.DiffSocket + "'\n"
	for text, ours := range map[string]bool{
		writtenBy + containerd.TemplateBase + containerd.TemplateMark + lines: true,
		writtenBy + containerd.TemplateBase + lines:                           true, // of earlier versions
		writtenBy + containerd.TemplateBase + "# mine\n" + lines:              false,
		containerd.TemplateBase + lines:                                       false,
	} {
		if isDropInText([]byte(text)) != ours {
			t.Errorf("%q is pilot's: %t", text, !ours)
		}
	}
}
