package postgres

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestTemporary(t *testing.T) {
	for code, want := range map[string]bool{
		"": true, "0": false, "57P01": true, readOnlyTransaction: true, invalidStatementName: true, duplicatePreparedStatement: true,
		"23505": false, "42601": false, protocolViolation: true,
	} {
		if got := Temporary(&pgconn.PgError{Code: code}); got != want {
			t.Errorf("%q: %v", code, got)
		}
	}
	if !Temporary(errors.New("connection refused")) {
		t.Error("an error that is not the database's answer is not temporary")
	}
}
