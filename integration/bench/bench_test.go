package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// The benchmarks compare pilot with its peers: each round measures ours, then
// theirs, so that both meet the machine in the same state. `make bench` runs
// them and prints the table of all; each leaves a row in it.

// row is the outcome of a comparison.
type row struct {
	Name   string       `json:"name"`
	Peer   string       `json:"peer"`
	Unit   string       `json:"unit"`
	Ours   float64      `json:"ours"`   // median
	Theirs float64      `json:"theirs"` // median
	Ratio  float64      `json:"ratio"`  // median of ours to theirs, round by round
	Target string       `json:"target,omitempty"`
	Pairs  [][2]float64 `json:"pairs"`
}

var rows []*row

// comparison is what is measured, in what, against whom. Target is the bound
// that was set for the ratio of ours to theirs.
type comparison struct {
	name, peer, unit, target string
}

// compare measures ours and theirs in turn, once for each of b's rounds.
func compare(b *testing.B, c comparison, ours, theirs func() float64) {
	b.Helper()
	r := &row{Name: c.name, Peer: c.peer, Unit: c.unit, Target: c.target}
	ours() // which also fills caches
	theirs()
	for b.Loop() {
		r.Pairs = append(r.Pairs, [2]float64{ours(), theirs()})
	}
	var each [3][]float64
	for _, p := range r.Pairs {
		each[0], each[1], each[2] = append(each[0], p[0]), append(each[1], p[1]), append(each[2], p[0]/p[1])
	}
	r.Ours, r.Theirs, r.Ratio = harness.Median(each[0]), harness.Median(each[1]), harness.Median(each[2])
	rows = append(rows, r)
	b.ReportMetric(0, "ns/op") // which means nothing here
	b.ReportMetric(r.Ours, "ours-"+r.Unit)
	b.ReportMetric(r.Theirs, "theirs-"+r.Unit)
	b.ReportMetric(r.Ratio, "ratio")
}

// measure is a comparison with a figure that was set.
func measure(b *testing.B, c comparison, bound float64, ours func() float64) {
	b.Helper()
	compare(b, c, ours, func() float64 { return bound })
}

// printRows prints the table of all comparisons, and writes them to the file that
// $PILOT_BENCH names.
func printRows() error {
	if len(rows) == 0 {
		return nil
	}
	var table strings.Builder
	fmt.Fprintf(&table, "\n| what | against | ours | theirs | ratio | target |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, r := range rows {
		fmt.Fprintf(&table, "| %s | %s | %s %s | %s %s | %.3g | %s |\n", r.Name, r.Peer, figure(r.Ours), r.Unit, figure(r.Theirs), r.Unit, r.Ratio, r.Target)
	}
	fmt.Print(table.String())
	file := os.Getenv("PILOT_BENCH")
	if file == "" {
		return nil
	}
	out, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}

// figure writes a number with three digits that count.
func figure(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// took returns how long f takes, in milliseconds.
func took(f func()) float64 {
	start := time.Now()
	f()
	return float64(time.Since(start)) / float64(time.Millisecond)
}

// rate returns how many megabytes, of 10^6 bytes, f deals with in a second,
// when it deals with n bytes.
func rate(n int, f func()) float64 {
	return float64(n) / 1000 / took(f)
}
