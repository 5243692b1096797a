# The image of the page, in the registry.
skopeo copy -q oci:app docker://registry.example.com/app:1
