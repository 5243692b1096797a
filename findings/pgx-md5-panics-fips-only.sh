#!/usr/bin/env bash
# pgx panics when a PostgreSQL server asks for a password by MD5 and Go allows only what
# FIPS 140-3 approves. With require_auth=!md5 in the connection string it is an error.
#
# Exits non-zero if that changes. Needs Go and the network.
set -euo pipefail
pgx=v5.12.0

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/jackc/pgx/v5/pgconn"
)

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))                                // the startup message
			conn.Write([]byte{'R', 0, 0, 0, 12, 0, 0, 0, 5, 1, 2, 3, 4}) // AuthenticationMD5Password
			conn.Read(make([]byte, 4096))                                // the password
			conn.Close()
		}
	}()
	_, err = pgconn.Connect(context.Background(), fmt.Sprintf("postgres://a:b@%s/c?sslmode=disable&%s", l.Addr(), os.Args[1]))
	fmt.Println(err)
}
GO
(go mod init finding && go get github.com/jackc/pgx/v5@$pgx && go mod tidy && go build -o finding .) >build.log 2>&1 || { tail build.log; exit 2; }
echo "github.com/jackc/pgx/v5 $pgx"
echo "otherwise it answers, and this server hangs up:"
./finding application_name=x
echo "with GODEBUG=fips140=only:"
! GODEBUG=fips140=only ./finding application_name=x 2>err || { echo "that has changed"; exit 1; }
head -1 err
grep -q '^panic: crypto/md5: use of MD5 is not allowed' err || { echo "that has changed"; exit 1; }
GODEBUG=fips140=only ./finding require_auth='!md5' | tee out
grep -q 'requested md5 authentication' out || { echo "that has changed"; exit 1; }
