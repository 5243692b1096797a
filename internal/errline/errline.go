// Package errline joins errors in one line, as a log and a command's message want
// them.
package errline

import "fmt"

// Join returns the errors with semicolons between them, but for those that are
// nil, and nil if all are. [errors.Is] and [errors.As] find each. One alone is
// returned as it is.
func Join(errs ...error) (line error) {
	for _, err := range errs {
		switch {
		case line == nil:
			line = err
		case err != nil:
			line = fmt.Errorf("%w; %w", line, err)
		}
	}
	return line
}
