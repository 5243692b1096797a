package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

const day = 24 * time.Hour

// days is the value of a flag for long durations: what time.ParseDuration takes,
// and whole days before it, as in 90d and 1d12h.
type days time.Duration

func (d *days) Set(s string) error {
	rest := s
	var sum time.Duration
	if n, after, ok := strings.Cut(s, "d"); ok {
		whole, err := strconv.ParseUint(n, 10, 32)
		if err != nil || whole > 100_000 {
			return d.invalid(s)
		}
		sum, rest = time.Duration(whole)*day, after
	}
	if rest != "" {
		more, err := time.ParseDuration(rest)
		if err != nil || more < 0 {
			return d.invalid(s)
		}
		sum += more
	}
	if s == "" {
		return d.invalid(s)
	}
	*d = days(sum)
	return nil
}

func (*days) invalid(s string) error {
	return fmt.Errorf("%q is not a duration: write 90d, 12h or 30m", s)
}

func (d *days) String() string {
	if d == nil {
		return ""
	}
	sum := time.Duration(*d)
	switch whole, rest := sum/day, sum%day; {
	case whole == 0:
		return rest.String()
	case rest == 0:
		return fmt.Sprintf("%dd", whole)
	default:
		return fmt.Sprintf("%dd%s", whole, rest)
	}
}

// newDays returns the value of a flag with a default.
func newDays(d time.Duration) *days { return (*days)(&d) }
