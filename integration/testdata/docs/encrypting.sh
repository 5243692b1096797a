# A broker, a CI machine's certificate and the page's images, of which app:windows
# has a foreign layer whose content is not here.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
copilot enroll --role ci --out /etc/pilot builder
cp /etc/copilot/ca.pem /etc/pilot/
skopeo copy -q oci:app docker://registry.example.com/app:1
ctr-pilot images import --no-unpack --all-platforms windows.tar
ctr-pilot images import --no-unpack app.tar
image=$(buildah pull -q oci:app)
buildah tag "$image" app
