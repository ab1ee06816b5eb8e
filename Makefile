# varve: two targets do everything on a fresh Debian machine with Go:
# `make demo` and `make test`. Both install what they need.

GO      ?= go
TAGS    := seccomp
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X varve.dev/internal/version.Version=$(VERSION)
GOBUILD := CGO_ENABLED=1 $(GO) build -trimpath -tags $(TAGS) -ldflags "$(LDFLAGS)"
# The linter is built once per version and kept in Go's cache.
LINTER  := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOTEST   = CGO_ENABLED=1 $(GO) test -tags $(TAGS)$(TIER)

# What the build, the tests and the demo need from Debian.
PACKAGES := gcc libc6-dev pkg-config libseccomp-dev mmdebstrap busybox-static \
            docker-registry e2fsprogs xfsprogs btrfs-progs fuse3 iproute2 crun umoci git bzip2 xz-utils

# What else the tests beside other tools need.
CLIENTS := docker.io podman containerd runc crun
PEERS   := runc containerd docker.io

.PHONY: all build deps demo test test-clients test-peers buildkit-suite test-race lint powercut crash kill faults barrier dbdamage corrupt heal harduse limits deep online reclaim soak-builder bench-builder clean

all: build

# bin/varve is the command, bin/varve-runtime the small shim and init.
build: deps
	$(GOBUILD) -o bin/ ./cmd/varve ./cmd/varve-runtime

# Installs the packages that are missing; does nothing, and needs no network,
# when none is.
deps:
	@scripts/install-packages $(PACKAGES)

# A real Debian image from a Dockerfile, run and checked, on a store of its own.
demo: build
	scripts/demo

test: build
	REQUIRE_ROOT=$${REQUIRE_ROOT:-$$(test "$$(id -u)" = 0 && echo 1)} $(GOTEST) -timeout 12m ./...

# docker, podman and containerd take what varve made, and give it back.
test-clients: TIER := ,clients
test-clients: build
	@scripts/install-packages $(CLIENTS)
	REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 20m -run TestClients ./cmd/varve

# The corpus of Dockerfiles by BuildKit, which is built once per version: it
# makes what varve has to. And what a power cut leaves of containerd's pulls.
test-peers: TIER := ,peers
test-peers: build
	@scripts/install-packages $(PEERS)
	REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 40m -v -run TestPeers ./internal/corpustest ./internal/crashtest

# BuildKit's own tests of the Dockerfile frontend, against varve in buildkitd's
# place; it is built with them once per version. TESTS chooses by a regexp.
buildkit-suite: build
	scripts/buildkit-suite $(if $(TESTS),'$(TESTS)')

# The race detector over the packages that share memory between goroutines.
test-race: deps
	$(GOTEST) -race -timeout 20m ./durable/... ./metadata/... ./journal/... ./content/... ./snapshotter/... ./layer/... ./fsck/...

lint: deps
	$(GO) vet -tags $(TAGS),clients,peers ./...
	$(LINTER) run --build-tags $(TAGS),clients,peers ./...
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }

# Campaigns: minutes to hours, with a short seeded run of each in `test`.
# They write their tables into docs/CRASH.md.
# make powercut FS=ext4|xfs|btrfs CASES=500 SEED=1 (no FS: all three): power
# cuts of a store at work, of one with a planted bug, and of other engines.
powercut: TIER := ,peers
powercut: deps
	@scripts/install-packages $(CLIENTS)
	FS=$(FS) CASES=$(or $(CASES),500) SEED=$(SEED) VARVE_RECORD=1 REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run 'TestPowerCut|Sees|Planted|UnderTheRig' ./internal/crashtest

# CASES kills at moments that nobody chose: of all commands and the daemon, of a
# daemon in the middle of long builds (a tenth of them), and of a store at work in
# one process. make kill CASES=1000 SEED=1
kill: deps
	CASES=$(or $(CASES),1000) SEED=$(SEED) VARVE_RECORD=1 REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v \
		-run 'TestKillCommands|TestKillAtRandom|TestKillInABuild|LeftoversAreSeen|RecoveryFollows' ./internal/crashtest

# Each change to a store's files fails, in turn, or CASES of them: on a disk that
# breaks and on one that is full, in pulls and removals and in builds.
faults: deps
	CASES=$(or $(CASES),100000) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run 'TestFaults|FailedSync' ./internal/crashtest

# What durability costs, and what other writers' dirty pages do to it, PAIRS
# times each.
barrier: deps
	VARVE_TIMINGS=1 FS=$(FS) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 1h -v -run 'Barrier|Strangers' ./internal/crashtest

# Every page of a store's database made bad in many ways, or CASES of them:
# before it is opened, and while it is.
dbdamage: deps
	CASES=$(or $(CASES),100000) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run 'TestDamagedDatabase|WhileOpen|LogLost|NobodysData' ./internal/crashtest
	VARVE_ALL_DAMAGE=1 $(GOTEST) -count=1 -timeout 1h -v -run TestEveryDamagedPage ./metadata

# A store damaged in every way, SEEDS times each; KIND: in that one, SEED: from
# that seed on. Writes the tables of docs/FSCK.md.
corrupt: deps
	SEEDS=$(or $(SEEDS),50) SEED=$(SEED) KIND='$(KIND)' VARVE_RECORD=$(if $(KIND),,1) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run TestEveryDamageIsFound ./internal/corrupttest

# The same for the ways that are promised to heal, repaired: what heals from
# where, for each of what may be there to heal from.
heal: deps
	SEEDS=$(or $(SEEDS),20) SEED=$(SEED) KIND='$(KIND)' VARVE_RECORD=$(if $(KIND),,1) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run 'TestHeals$$' ./internal/corrupttest

# STORES stores after hard use, in which a check finds nothing.
harduse: deps
	STORES=$(or $(STORES),50) SEED=$(SEED) VARVE_RECORD=1 REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run TestHardUse ./internal/corrupttest

# BUILDS builds and PULLS pulls in stores with room for few, whose size is looked
# at ten times a second.
limits: deps
	BUILDS=$(or $(BUILDS),200) PULLS=$(or $(PULLS),1000) REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 1h -v ./internal/limittest

# A deep check beside sha256sum over the same files, and its memory on a store
# of a million; a loop of pull and run alone and beside a check with --rate.
deep online: build
	$(GO) run ./benchmarks/$@

# What removals, and the question what the disk holds, cost; beside dockerd and
# containerd where they are installed.
reclaim: build
	$(GO) run ./benchmarks/reclaim $(or $(QUESTIONS),rmi sweep df)

# Builds beside BuildKit and docker in one run, ROUNDS times each; or the named
# WORKLOADS alone.
bench-builder: build
	@scripts/install-packages $(PEERS)
	$(GO) run ./benchmarks/builder -rounds $(or $(ROUNDS),10) $(WORKLOADS)

# BUILDS different builds in a daemon with a cap, beside buildkitd: the heap that
# lives, the memory of all processes, the store each second. Draws docs/soak.svg.
soak-builder: build
	@scripts/install-packages runc
	$(GO) run ./benchmarks/soak -builds $(or $(BUILDS),500) -plot docs/soak.svg

# The simulation at every change instead of every k-th, and every kill.
crash: deps
	VARVE_ALL_CRASHES=1 REQUIRE_ROOT=1 $(GOTEST) -count=1 -timeout 3h -v -run 'KillAtEvery|CalledOff|Simulated|PowerCutAtEveryChange' ./snapshotter ./internal/crashtest

clean:
	rm -rf bin
