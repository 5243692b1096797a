# pilot: encrypted container images for containerd.
#
#   make build    the programs, into bin/        (PKCS11=1: with HSM support in all)
#   make install  into PREFIX/bin                (PREFIX=/usr/local, DESTDIR=)
#   make demo     encrypt, push, pull and run an image, in private directories
#   make images   container images, as OCI layouts in dist/images (ARCHS="amd64 arm64")
#   make test     all tests but the next two; installs what they need first
#   make test-node installs by a DaemonSet's pod on a machine of its own that systemd runs
#   make test-kubernetes  tests on a Kubernetes of their own, which takes long to build
#   make bench    compares pilot with its peers, side by side (ROUNDS=7), into bench.json
#   make bench-go Go's benchmarks of the packages, by benchstat (COUNT=6)
#   make check    formatting, vet, staticcheck, govulncheck

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
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: build images install demo test test-node test-kubernetes test-unit bench bench-go check tools clean

build:
	CGO_ENABLED=$(NODE_CGO) go build $(GOFLAGS_BUILD) -o bin/ ./cmd/pilot ./cmd/pilot-decoder
	CGO_ENABLED=1 go build $(GOFLAGS_BUILD) -o bin/ ./cmd/copilot ./ctr-pilot

install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 bin/pilot bin/pilot-decoder bin/copilot bin/ctr-pilot $(DESTDIR)$(PREFIX)/bin/

# Static programs and nothing else. PKCS#11 modules are libraries, so an image
# has no use for them.
ARCHS ?= amd64 arm64
GOFLAGS_IMAGE = $(GOFLAGS_BUILD) -tags no_pkcs11
IMAGE_FLAGS = -version $(VERSION) -revision $$(git rev-parse HEAD) -created $$(git log -1 --format=%ct) -license $(CURDIR)/LICENSE
images:
	@for arch in $(ARCHS); do \
		echo "building for $$arch"; \
		CGO_ENABLED=0 GOARCH=$$arch go build $(GOFLAGS_IMAGE) -o dist/programs/$$arch/ ./cmd/pilot ./cmd/pilot-decoder ./cmd/copilot || exit 1; \
	done
	cd packaging/ociimage && go build -buildvcs=false -o $(CURDIR)/dist/ociimage .
	dist/ociimage $(IMAGE_FLAGS) -out dist/images/pilot -user 0:0 -description "Installs pilot on a node" \
		pilot,pilot-decoder $(foreach a,$(ARCHS),$(a)=dist/programs/$(a))
	dist/ociimage $(IMAGE_FLAGS) -out dist/images/copilot -roots -description "pilot's key broker" \
		copilot $(foreach a,$(ARCHS),$(a)=dist/programs/$(a))

tools:
	scripts/install-tools.sh $(PILOT_TOOLS)

demo: build tools
	scripts/demo.sh

test: tools
	go test -buildvcs=false -timeout 20m ./...

# The tests that need neither root nor other programs.
test-unit:
	go test -buildvcs=false -race $$(go list -buildvcs=false ./... | grep -v /integration)

test-kubernetes:
	$(MAKE) images ARCHS=$$(go env GOARCH)
	scripts/install-tools.sh $(PILOT_TOOLS) kubernetes
	go test -buildvcs=false -tags kubernetes -timeout 20m -run Kubernetes ./integration

ROUNDS ?= 7
bench: tools
	PILOT_BENCH=$(CURDIR)/bench.json go test -buildvcs=false -timeout 90m -run '^$$' -bench . -benchtime $(ROUNDS)x ./integration

COUNT ?= 6
bench-go:
	go test -buildvcs=false -run '^$$' -bench . -count $(COUNT) ./processor ./keyprovider ./image >bench.txt || { cat bench.txt; exit 1; }
	go run $(BENCHSTAT) bench.txt

check:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted: $$unformatted"; exit 1; fi
	go vet -buildvcs=false -tags kubernetes ./...
	GOFLAGS=-buildvcs=false go run $(STATICCHECK) -tags kubernetes ./...
	@if timeout 20 go run $(GOVULNCHECK) -version >/dev/null 2>&1 && timeout 20 curl -sfo /dev/null https://vuln.go.dev/index/modules.json; then \
		GOFLAGS=-buildvcs=false go run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: its database can't be reached from here; not run"; fi

clean:
	rm -rf bin dist
