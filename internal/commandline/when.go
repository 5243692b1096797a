package commandline

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

const day = 24 * time.Hour

// When is the value of a flag for a time that is days away: a duration, as in 90d,
// 1d12h or 30m, or a date, as in 2030-01-01 or 2030-01-02T03:04:05Z. A date without
// a time begins at midnight, UTC. The zero value is a duration of 0.
type When struct {
	after time.Duration
	at    time.Time // if it is a date
}

// After returns the value that is d away.
func After(d time.Duration) *When { return &When{after: d} }

// Set implements [flag.Value].
func (w *When) Set(s string) error {
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if at, err := time.Parse(layout, s); err == nil {
			*w = When{at: at}
			return nil
		}
	}
	rest := s
	var sum time.Duration
	if n, after, ok := strings.Cut(s, "d"); ok {
		whole, err := strconv.ParseUint(n, 10, 32)
		if err != nil || whole > 100_000 {
			return w.invalid(s)
		}
		sum, rest = time.Duration(whole)*day, after
	}
	if rest != "" {
		more, err := time.ParseDuration(rest)
		if err != nil || more < 0 {
			return w.invalid(s)
		}
		sum += more
	}
	if s == "" {
		return w.invalid(s)
	}
	*w = When{after: sum}
	return nil
}

func (*When) invalid(s string) error {
	return fmt.Errorf("%q is neither a duration, as in 90d, 12h or 30m, nor a date, as in 2030-01-01 or 2030-01-02T03:04:05Z", s)
}

// At returns the time that w means, seen from now.
func (w *When) At(now time.Time) time.Time {
	if w.at.IsZero() {
		return now.Add(w.after)
	}
	return w.at
}

// Until returns how far w is away from now. A date in the past is an error.
func (w *When) Until(now time.Time) (time.Duration, error) {
	if w.at.IsZero() {
		return w.after, nil
	}
	if !w.at.After(now) {
		return 0, fmt.Errorf("%s is in the past", w)
	}
	return w.at.Sub(now), nil
}

// String implements [flag.Value].
func (w *When) String() string {
	switch {
	case w == nil:
		return ""
	case !w.at.IsZero():
		return w.at.Format(time.RFC3339)
	}
	return Days(w.after)
}

// Days writes a duration with its whole days, as in 1d12h0m0s.
func Days(d time.Duration) string {
	switch whole, rest := d/day, d%day; {
	case whole == 0:
		return rest.String()
	case rest == 0:
		return fmt.Sprintf("%dd", whole)
	default:
		return fmt.Sprintf("%dd%s", whole, rest)
	}
}

// Get implements [flag.Getter].
func (w *When) Get() any { return w }
