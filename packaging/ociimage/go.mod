module github.com/ctrlplane/pilot/packaging/ociimage

go 1.26.6
