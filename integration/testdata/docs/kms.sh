# OpenBao in Vault's place, which has the same commands, and a token of SoftHSM's.
cat >/etc/systemd/system/bao.service <<'END'
[Service]
Environment=HOME=/root
ExecStart=/usr/local/bin/bao server -dev -dev-root-token-id=root -dev-no-store-token
END
systemctl start bao
export VAULT_ADDR=http://127.0.0.1:8200 VAULT_TOKEN=root
vault() { bao "$@"; }
timeout 60 sh -c 'until bao status >/dev/null 2>&1; do sleep 0.1; done'
softhsm2-util --init-token --free --label team --pin 1234 --so-pin 1234
# It asks for the PIN on a terminal.
pkcs11-tool() (
	set +o pipefail
	while echo 1234 2>/dev/null; do sleep 1; done | script -qec "/usr/bin/pkcs11-tool $*" /dev/null
)
