# pilot: encrypted container images for containerd.
#
#   make build    the programs, into bin/        (PKCS11=1: with HSM support in all)
#   make install  into PREFIX/bin                (PREFIX=/usr/local, DESTDIR=)
#   make demo     encrypt, push, pull and run an image, in private directories
#   make test     all tests; installs what they need first
#   make bench    compares pilot with its peers, side by side (ROUNDS=7), into bench.json
#   make bench-go Go's benchmarks of the packages, by benchstat (COUNT=6)
#   make node-image  a bootable disk image of a node, into dist/node-image/ (NODE_IMAGE_PACKAGES=: with more packages)
#   make test-node   boots that image in qemu and as a container; installs what it needs first
#   make check    formatting, vet, staticcheck, licences, govulncheck

PREFIX  ?= /usr/local
DESTDIR ?=
# Where make test and make demo keep the programs that they run with.
PILOT_TOOLS ?= $(CURDIR)/.cache/tools
export PILOT_TOOLS

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
GOFLAGS_BUILD := -trimpath -buildvcs=false -ldflags '-s -w -X github.com/ctrlplane/pilot/version.Version=$(VERSION)'

# pilot and pilot-decoder run on every node, so they depend on no library there.
# ocicrypt talks to PKCS#11 modules through cgo.
ifeq ($(PKCS11),1)
NODE_CGO := 1
else
NODE_CGO := 0
endif

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
CYCLONEDX   := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: build install demo test test-unit bench bench-go node-image test-node check tools clean

build:
	CGO_ENABLED=$(NODE_CGO) go build $(GOFLAGS_BUILD) -o bin/ ./cmd/pilot ./cmd/pilot-decoder
	CGO_ENABLED=1 go build $(GOFLAGS_BUILD) -o bin/ ./cmd/copilot ./ctr-pilot

install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 bin/pilot bin/pilot-decoder bin/copilot bin/ctr-pilot $(DESTDIR)$(PREFIX)/bin/

tools:
	scripts/install-tools.sh $(PILOT_TOOLS)

demo: build tools
	scripts/demo.sh

test: tools
	go test -buildvcs=false -timeout 20m ./...

# The tests that need neither root nor other programs.
test-unit:
	go test -buildvcs=false -race $$(go list -buildvcs=false ./... | grep -v /integration)

ROUNDS ?= 7
bench: tools
	PILOT_BENCH=$(CURDIR)/bench.json go test -buildvcs=false -timeout 90m -run '^$$' -bench . -benchtime $(ROUNDS)x ./integration

COUNT ?= 6
bench-go:
	go test -buildvcs=false -run '^$$' -bench . -count $(COUNT) ./processor ./keyprovider ./image >bench.txt || { cat bench.txt; exit 1; }
	go run $(BENCHSTAT) bench.txt

NODE_IMAGE_DEB ?=
node-image:
	@[ -n "$(NODE_IMAGE_DEB)" ] || $(MAKE) packages ARCHS=$$(dpkg --print-architecture) FORMATS=deb
	node-image/build.sh $(or $(NODE_IMAGE_DEB),dist/pilot_*_$$(dpkg --print-architecture).deb) dist/node-image/pilot-node.raw

test-node:
	scripts/install-tools.sh $(PILOT_TOOLS) qemu-system-x86 ovmf systemd-container e2fsprogs fdisk
	go test -buildvcs=false -timeout 30m -tags node -run '^TestNodeImage$$' -v ./integration

check:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted: $$unformatted"; exit 1; fi
	go vet -buildvcs=false ./...
	go vet -buildvcs=false -tags node ./integration
	GOFLAGS=-buildvcs=false go run $(STATICCHECK) ./...
	@sbom=$$(mktemp) && trap "rm -f $$sbom" EXIT && \
	GOFLAGS=-buildvcs=false go run $(CYCLONEDX) mod -licenses -json -output $$sbom . && scripts/check-dependencies.sh $$sbom
	@if timeout 20 go run $(GOVULNCHECK) -version >/dev/null 2>&1 && timeout 20 curl -sfo /dev/null https://vuln.go.dev/index/modules.json; then \
		GOFLAGS=-buildvcs=false go run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: its database can't be reached from here; not run"; fi

clean:
	rm -rf bin
