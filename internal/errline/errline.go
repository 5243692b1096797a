// Package errline joins errors in one line, for logs and messages of commands.
package errline

import "fmt"

// Join returns the errors that are not nil, joined by semicolons, or nil if there are
// none. [errors.Is] and [errors.As] find each. A single error is returned as it is.
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
