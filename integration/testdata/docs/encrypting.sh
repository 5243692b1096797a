# A node with pilot and a broker that it may use; the page's images, of which
# app:windows has a foreign layer whose content is not here.
apt-get -qq install ./copilot_*.deb ./pilot_*.deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
pilot node install --now
export OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf
skopeo copy -q oci:app docker://registry.example.com/app:1
ctr-pilot images import --no-unpack --all-platforms windows.tar
ctr-pilot images import --no-unpack app.tar
