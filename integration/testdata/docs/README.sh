# The image of the page, in the registry.
skopeo copy -q oci:app docker://registry.example.com/app:1
# ctr now and then loses what a container prints that ends at once.
cat >/usr/local/bin/ctr <<'END'
#!/bin/sh
[ "$1" = run ] || exec /usr/bin/ctr "$@"
for _ in 1 2 3; do
	output=$(/usr/bin/ctr "$@") || exit
	[ -z "$output" ] || break
done
echo "$output"
END
chmod +x /usr/local/bin/ctr
