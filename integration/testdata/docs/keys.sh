# A broker that is node and CI too, and OpenBao in Vault's place, with a key for the master key.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
pilot node install --now
export PILOT_BROKER=unix:///run/copilot/copilot.sock
cat >/etc/systemd/system/bao.service <<'END'
[Service]
Environment=HOME=/root
ExecStart=/usr/local/bin/bao server -dev -dev-root-token-id=root -dev-no-store-token
END
systemctl start bao
export VAULT_ADDR=http://127.0.0.1:8200 VAULT_TOKEN=root
timeout 60 sh -c 'until bao status >/dev/null 2>&1; do sleep 0.1; done'
bao secrets enable transit
bao write -f transit/keys/copilot-master
install -m 0600 -o copilot -g copilot /dev/null /etc/copilot/vault-token
printf root >/etc/copilot/vault-token
