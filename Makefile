# pilot: encrypted container images for containerd.
#
#   make build          the programs, into bin/        (PKCS11=1: with HSM support in all; FIPS=1: with the FIPS 140-3 module)
#   make install        into PREFIX/bin                (PREFIX=/usr/local, DESTDIR=)
#   make demo           encrypt, pull and run an image, lose and restore the broker, in private directories
#   make demo-svg       draws what make demo prints, into docs/demo.svg
#   make packages       debs and rpms for amd64 and arm64, into dist/ (ARCHS=amd64, FORMATS=deb: only those)
#   make images         container images, as OCI layouts in dist/images/ (ARCHS=amd64)
#   make chart          the Helm chart, as dist/pilot-chart-VERSION.tgz
#   make manifests      the manifests in packaging/kubernetes, from the chart
#   make node-image     a bootable disk image of a node, into dist/node-image/ (NODE_IMAGE_PACKAGES=: with more packages)
#   make clients        archives of the client programs for macOS and Windows, into dist/
#   make release        all that a release of the tag at HEAD consists of, into dist/ (GPG_KEY=: signs the checksums)
#
# All tests install what they need first.
#   make test           all tests except these:
#   make test-all       make test, with the tests that take longest
#   make test-nodes     sets up nodes with each containerd and each configuration that nodes have
#   make test-packages  installs, upgrades, removes and purges the packages, and runs the documentation's commands
#   make test-node      boots the node image in qemu and as a container, and installs by a DaemonSet's pod
#   make test-kubernetes  pulls and installs on a Kubernetes of its own, which takes a quarter of an hour to build
#   make test-engines   with Docker Engine 29, BuildKit, CRI-O and syft, which take some minutes to build
#   make test-windows   runs the client programs for Windows under Wine
#   make test-fips      all tests, with programs that have the FIPS 140-3 module and GODEBUG=fips140=only
#   make test-race      all of make test, with programs that look for data races
#   make test-repeat    make test COUNT=10 times, the last half of them with BUSY=2 busy loops per core beside it
#   make test-long      kills and floods for an hour or so (ROUNDS_LONG=)
#   make soak           pulls, runs and rewraps for an hour, and looks whether anything grows (SOAK=10m)
#   make test-property  encrypts IMAGES=5000 random images and checks what is readable (SEED=: a seed, or the ID of one that failed)
#   make fuzz           each fuzz target for a minute (FUZZTIME=)
#   make check          formatting, vet, staticcheck, licences, govulncheck
#   make bench          compares pilot with its peers, side by side (ROUNDS=7), into bench.json
#   make bench-go       Go's benchmarks of the packages, by benchstat (COUNT=6)

PREFIX  ?= /usr/local
DESTDIR ?=
# Where make test and make demo keep the programs that they run with.
PILOT_TOOLS ?= $(CURDIR)/.cache/tools
export PILOT_TOOLS

# The same for all that is built, so that each package is compiled once for programs, vet,
# staticcheck and tests, wherever the repository is. Flags of your own are kept.
GOFLAGS_ALL := -trimpath -buildvcs=false
export GOFLAGS := $(GOFLAGS_ALL) $(filter-out $(GOFLAGS_ALL),$(shell go env GOFLAGS 2>/dev/null))

VERSION := $(shell scripts/version.sh 2>/dev/null || echo dev)
GOFLAGS_BUILD := -ldflags '-s -w -X github.com/ctrlplane/pilot/internal/version.Version=$(VERSION)'

# pilot and pilot-decoder run on every node, so they depend on no library there.
# ocicrypt talks to PKCS#11 modules through cgo.
ifeq ($(PKCS11),1)
NODE_CGO := 1
else
NODE_CGO := 0
endif

# FIPS=1 builds with the validated version of the Go Cryptographic Module, another value with
# that version of it: docs/fips.md. It counts for packages, images and clients, too.
FIPS_MODULE := v1.0.0
FIPS ?=
ifneq ($(FIPS),)
export GOFIPS140 := $(if $(filter 1,$(FIPS)),$(FIPS_MODULE),$(FIPS))
endif

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
CYCLONEDX   := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: build help install demo demo-svg images packages chart manifests clients node-image release test test-all test-unit test-unit-raced test-unit-unraced test-integration test-packages test-node test-nodes test-kubernetes test-engines test-windows test-fips test-race test-repeat test-long test-property soak fuzz bench bench-go check tools clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

build:
	CGO_ENABLED=$(NODE_CGO) go build $(GOFLAGS_BUILD) -o bin/ ./cmd/pilot ./cmd/pilot-decoder
	CGO_ENABLED=1 go build $(GOFLAGS_BUILD) -o bin/ ./cmd/copilot ./ctr-pilot

install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 bin/pilot bin/pilot-decoder bin/copilot bin/ctr-pilot $(DESTDIR)$(PREFIX)/bin/

# Static programs and nothing else. PKCS#11 modules are libraries, so an image
# has no use for them.
ARCHS ?= amd64 arm64
DIST  ?= dist
override DIST := $(abspath $(DIST))
GOFLAGS_IMAGE = $(GOFLAGS_BUILD) -tags no_pkcs11
IMAGE_FLAGS = -version $(VERSION) -revision $$(git rev-parse HEAD) -created $$(git log -1 --format=%ct) -license $(CURDIR)/LICENSE
images:
	@for arch in $(ARCHS); do \
		echo "building for $$arch"; \
		CGO_ENABLED=0 GOARCH=$$arch go build $(GOFLAGS_IMAGE) -o $(DIST)/programs/$$arch/ ./cmd/pilot ./cmd/pilot-decoder ./cmd/copilot || exit 1; \
	done
	cd packaging/ociimage && go build -o $(DIST)/ociimage .
	$(DIST)/ociimage $(IMAGE_FLAGS) -out $(DIST)/images/pilot -user 0:0 -description "Installs pilot on a node" \
		pilot,pilot-decoder $(foreach a,$(ARCHS),$(a)=$(DIST)/programs/$(a))
	$(DIST)/ociimage $(IMAGE_FLAGS) -out $(DIST)/images/copilot -roots -description "pilot's key broker" \
		copilot $(foreach a,$(ARCHS),$(a)=$(DIST)/programs/$(a))

chart: export VERSION := $(VERSION)
chart:
	scripts/chart.sh $(DIST)

manifests:
	scripts/install-tools.sh $(PILOT_TOOLS) helm
	cd packaging/kubernetes/validate && go test -count=1 -tags kubernetes -run '^TestManifestsAreMadeFromTheChart$$' -update . && \
	go test -count=1 -run '^TestManifestsFitTheChart$$' -update .

tools:
	scripts/install-tools.sh $(PILOT_TOOLS)

demo: build tools
	scripts/demo.sh

demo-svg: build tools
	scripts/demo-svg.py >docs/demo.svg.new
	mv docs/demo.svg.new docs/demo.svg

# Tests mostly wait, so each package runs more of them at once than there are cores.
PARALLEL ?= 3
# And packages of them: they wait much for timers and for one another's programs.
TOGETHER ?= $(shell echo $$(($$(nproc) + 1)))

# make check vets all packages, so go test does not do so again.
TEST := go test -vet=off

# All at once: while one waits, another one computes.
test: tools
	+$(MAKE) --no-print-directory -j3 test-unit-raced test-unit-unraced test-integration

# The packages that take longest begin first, so that none is left to run alone.
LONGEST := ./integration/node ./integration/pull ./integration/encrypt
test-integration: tools
	$(TEST) -count=1 -timeout 90m -short -p $(TOGETHER) -parallel $(PARALLEL) $(LONGEST) \
		$$(go list ./integration/... | grep -v -e /bench$$ $(foreach p,$(LONGEST),-e '/pilot$(p:.%=%)$$'))
	cd packaging/kubernetes/validate && $(TEST) ./...

# With the tests that take longest.
test-all: tools test-unit
	$(TEST) -count=1 -timeout 120m -p $(TOGETHER) -parallel $(PARALLEL) ./integration/...

# The same with programs that look for data races, and so take longer.
test-race: tools test-unit
	$(TEST) -race -timeout 60m -skip '^TestProperty$$' $(UNRACED)
	GORACE="halt_on_error=1 exitcode=66" PILOT_RACE=1 go test -count=1 -timeout 180m -parallel $(PARALLEL) ./integration/...

# The mode is linked into our programs and tests, so that no others have it. Examples can't be
# skipped one by one where they show what is refused.
test-fips: tools
	GOFIPS140=$(FIPS_MODULE) $(TEST) -count=1 -timeout 60m -skip '^Example' -ldflags=-X=runtime.godebugDefault=fips140=only $$(go list ./... | grep -v /integration)
	GOFIPS140=$(FIPS_MODULE) PILOT_FIPS=1 $(TEST) -count=1 -timeout 120m -p $(TOGETHER) -parallel $(PARALLEL) ./integration/...

COUNT ?= 10
BUSY  ?= 2
test-repeat: tools
	scripts/repeat-tests.sh $(COUNT) $(BUSY)

# The tests that need neither root nor other programs. Many of them wait for timers, so more
# packages are tested at once than there are cores. Those of image handle much data, which the
# race detector makes slow; those of programs start them for each command, without callers at
# once; others would have the largest libraries compiled for it. make test-race has them with it.
PACKAGES ?= $(shell echo $$(($$(nproc) * 3)))
UNRACED  := ./image ./cmd/copilot ./cmd/pilot ./ctr-pilot ./node/doctor ./plugin/builtin \
	./copilot/kms/awskms ./copilot/kms/azurekms ./copilot/kms/gcpkms

test-unit: test-unit-raced test-unit-unraced

test-unit-raced:
	$(TEST) -race -timeout 30m -p $(PACKAGES) $$(go list ./... | grep -v -e /integration $(foreach p,$(UNRACED),-e '/pilot$(p:.%=%)$$'))

test-unit-unraced:
	$(TEST) -timeout 30m -p $(PACKAGES) $(UNRACED)

# Each version of containerd with each configuration.
test-nodes: tools
	PILOT_NODES=all go test -count=1 -timeout 120m -parallel $(PARALLEL) -run '^TestNode' -v ./integration/broker ./integration/node

test-kubernetes:
	$(MAKE) images ARCHS=$$(go env GOARCH)
	scripts/install-tools.sh $(PILOT_TOOLS) kubernetes
	cd packaging/kubernetes/validate && go test -count=1 -tags kubernetes .
	go test -count=1 -tags kubernetes -timeout 60m -run Kubernetes ./integration/cluster

test-engines:
	scripts/install-tools.sh $(PILOT_TOOLS) engines
	go test -count=1 -tags engines -timeout 60m -run '^(TestDocker29|TestBuildKit|TestBuiltinBuildKit|TestCRIO.*|Test.*FromMirror)$$' ./integration/engines ./integration/mirror ./integration/node

ROUNDS ?= 7
bench: tools
	PILOT_BENCH=$(CURDIR)/bench.json go test -timeout 90m -run '^$$' -bench . -benchtime $(ROUNDS)x ./integration/bench

bench-go: COUNT = 6
bench-go:
	go test -run '^$$' -bench . -count $(COUNT) ./processor ./keyprovider ./image >bench.txt || { cat bench.txt; exit 1; }
	go run $(BENCHSTAT) bench.txt

packages: export VERSION := $(VERSION)
packages:
	scripts/packages.sh $(DIST)

clients:
	scripts/clients.sh $(DIST)

release:
	scripts/release.sh $(DIST)

test-packages:
	scripts/install-tools.sh $(PILOT_TOOLS) lintian rpm man-db expect zsh fish bash-completion systemd-container
	go test -count=1 -timeout 120m -tags packages -run '^TestPackage' ./integration/docs ./integration/install
NODE_IMAGE_DEB ?=
node-image:
	@[ -n "$(NODE_IMAGE_DEB)" ] || $(MAKE) packages ARCHS=$$(dpkg --print-architecture) FORMATS=deb
	packaging/node-image/build.sh $(or $(NODE_IMAGE_DEB),$(DIST)/pilot_*_$$(dpkg --print-architecture).deb) $(DIST)/node-image/pilot-node.raw

test-node:
	@[ -e $(DIST)/node-image/pilot-node.raw ] || $(MAKE) node-image
	scripts/install-tools.sh $(PILOT_TOOLS) qemu-system-x86 ovmf systemd-container e2fsprogs fdisk
	go test -count=1 -timeout 120m -tags node -run '^(TestNodeImage|TestDeploy)$$' -v ./integration/install

ROUNDS_LONG ?= 300
test-long: tools
	PILOT_ROUNDS=$(ROUNDS_LONG) PILOT_PULLS=64 PILOT_NODES=100,300,1000,3000,10000 \
		go test -count=1 -timeout 2h -run '^(TestKilledAtRandomLeavesWholeImages|TestManyPullsAtOnce|TestAllNodesReconnectAtOnce)$$' -v ./integration/faults ./integration/load

SOAK ?= 1h
soak: tools
	PILOT_SOAK=$(SOAK) go test -tags soak -timeout 0 -count=1 -run '^TestSoak$$' -v ./integration/load

IMAGES ?= 5000
SEED   ?= $(shell date +%s)
test-property:
	PILOT_IMAGES=$(IMAGES) PILOT_SEED=$(SEED) go test -count=1 -timeout 0 -run '^TestProperty$$' -v ./image

# The programs that run on macOS and Windows too.
CLIENTS := ./cmd/pilot ./cmd/copilot ./ctr-pilot

test-windows:
	scripts/install-tools.sh $(PILOT_TOOLS) wine
	go test -count=1 -tags wine ./integration/wine

FUZZTIME ?= 60s
fuzz:
	scripts/fuzz.sh $(FUZZTIME)

# Each takes minutes where nothing was built for it before; the workflows build and test all four.
CLIENT_PLATFORMS ?= windows/amd64
check:
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted: $$unformatted"; exit 1; fi
	go vet -tags man,packages,node,kubernetes,engines,soak,wine ./...
	cd integration/testdata/containerd && go list -deps . >/dev/null
	@export CGO_ENABLED=0; \
	for to in $(CLIENT_PLATFORMS); do \
		echo "build and vet for $$to"; export GOOS=$${to%/*} GOARCH=$${to#*/}; \
		go build $(CLIENTS) && go vet $(CLIENTS) || exit 1; \
	done
	go run $(STATICCHECK) ./...
	@sbom=$$(mktemp) && trap "rm -f $$sbom" EXIT && \
	go run $(CYCLONEDX) mod -licenses -json -output $$sbom . && scripts/check-dependencies.sh $$sbom
	@if timeout 20 curl -sfo /dev/null https://vuln.go.dev/index/modules.json; then \
		go run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: its database can't be reached from here; not run"; fi

clean:
	rm -rf bin $(DIST)
