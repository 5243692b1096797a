# A node and its broker, and a pull that failed.
apt-get -qq install ./copilot_*.deb ./pilot_*.deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
pilot node install --now
