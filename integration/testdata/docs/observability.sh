# A node and its broker, a request with the page's trace, and a pull that failed.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
pilot node install --now
curl -sf --unix-socket /run/copilot/copilot.sock -H 'traceparent: 00-e9ad510c25b6e714e99ca14a46f25783-00f067aa0ba902b7-01' http://copilot/api/v2/keks/team-a/key >/dev/null
OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf skopeo copy -q --encryption-key provider:pilot:team-a oci:app docker://registry.example.com/app:1
copilot keys disable team-a
systemctl reload pilot
if ctr-pilot images pull registry.example.com/app:1; then false; fi
