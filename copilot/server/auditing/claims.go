package auditing

import (
	"slices"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/copilot/policy"
)

// shownClaims are the claims by which a CI job and what started it are found, of GitHub
// Actions and GitLab. The numbers come first, since they always fit.
var shownClaims = []string{
	"run_id", "run_attempt", "pipeline_id", "job_id", "repository_id", "project_id", "sha",
	"repository", "project_path", "ref", "environment", "event_name", "pipeline_source", "workflow_ref", "job_workflow_ref", "actor", "user_login",
}

// maxClaims and maxLabels bound the claims and the labels in a line, in bytes.
const (
	maxClaims = 2000
	maxLabels = 1000
)

// Claims returns the claims of a caller's token that its lines have: those by which a
// CI job is found, and others by their names, those of them that fit.
func Claims(c policy.Claims, others []string) map[string]string {
	if c == nil {
		return nil
	}
	shown := make(map[string]string)
	room := maxClaims
	for _, name := range slices.Concat(shownClaims, others) {
		if texts, ok := c[name]; ok {
			add(shown, name, claimText(texts), &room)
		}
	}
	return shown
}

// Labels returns the labels of a workload's pod that have these keys, those of them that fit
// into a line.
func Labels(labels map[string]string, keys []string) map[string]string {
	var shown map[string]string
	room := maxLabels
	for _, key := range keys {
		if value, ok := labels[key]; ok {
			if shown == nil {
				shown = make(map[string]string)
			}
			add(shown, key, value, &room)
		}
	}
	return shown
}

// add adds a text, unless there is one of that name, or no room for so many bytes.
func add(shown map[string]string, name, text string, room *int) {
	// As it is shown, if it has to be quoted or cut.
	n := len(name) + min(len(strconv.Quote(text)), 300)
	if _, twice := shown[name]; !twice && n <= *room {
		*room -= n
		shown[name] = text
	}
}

// claimText returns a claim in one text: an array of several as in JSON. Claims that differ
// never look the same.
func claimText(texts []string) string {
	if len(texts) == 1 && !strings.HasPrefix(texts[0], "[") {
		return texts[0]
	}
	quoted := make([]string, len(texts))
	for i, text := range texts {
		quoted[i] = strconv.Quote(text)
	}
	return "[" + strings.Join(quoted, ",") + "]"
}
