# The images of the page, where the commands expect them.
ctr-pilot images import --no-unpack app.tar
image=$(buildah pull -q oci:app)
buildah tag "$image" app
