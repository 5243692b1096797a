# copilot from the package, and an image whose layer keys its KEK wraps.
apt-get -qq install ./copilot_*.deb ./pilot_*.deb >/dev/null
