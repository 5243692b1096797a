# copilot from the package, and an image whose layer keys its KEK wraps.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
