# A node with pilot and a broker that it may use.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
pilot node install --now
export OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf
