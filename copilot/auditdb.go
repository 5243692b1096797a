//go:build !no_postgres

package copilot

import "github.com/ctrlplane/pilot/copilot/audit"

func init() { openAuditDatabase = audit.OpenPostgres }
