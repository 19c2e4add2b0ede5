# SPDX-License-Identifier: Apache-2.0
# `make` with no target says what there is.

export CGO_ENABLED = 0
# Root runs things as it is; others by sudo.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

DURATION ?= 30m

.PHONY: help build run demo list generate haproxies test test-kernels fuzz lab bench soak clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST)

build: ## build ./fintrace
	go build -trimpath -o fintrace ./cmd/fintrace

run: build ## build and start `fintrace trace`
	$(SUDO) ./fintrace trace

demo: build ## a pile-up in a network namespace of its own, to watch with `make run`
	$(SUDO) ./fintrace demo

list: build ## build and run `fintrace list`
	$(SUDO) ./fintrace list

generate: ## rebuild the BPF objects and their bindings (needs clang-19)
	go generate ./...

haproxies: ## fetch the HAProxy versions that tests run beside the system's (Debian)
	internal/haproxytest/fetch

test: ## check formats, licences and generated files, and run all tests
	@.ci/check
	go test -timeout 20m ./...

fuzz: ## fuzz every parser and decoder, each with INPUTS (500000x, half an hour; or for a time: 1m)
	.ci/fuzz $(or $(INPUTS),500000x)

test-kernels: ## run the kernel tests on Debian's kernels from 5.10 on, in QEMU (some minutes each; KERNELS=5.10-amd64,7-amd64 for some)
	go build -trimpath -o dist/kernels.run ./internal/kernels
	dist/kernels.run -only '$(KERNELS)' $(GUESTS:%=-guests %)

lab: ## have real scenarios diagnosed, and print which has which finding (a minute)
	go test -c -o dist/lab.test ./cmd/fintrace
	cd cmd/fintrace && $(SUDO) ../../dist/lab.test -test.run '^TestLab' -lab.matrix

bench: build ## speed beside today's tools, as ratios, into BENCHMARKS.md and what README.md quotes of it (10 minutes; ONLY=host,start for some, to look at)
	go build -trimpath -o dist/bench ./internal/bench
	$(SUDO) dist/bench -fintrace ./fintrace $(if $(ONLY),-only $(ONLY),-o BENCHMARKS.md -quote README.md)

soak: ## every kind of connection and of fault at random, for DURATION (30m), against two witnesses; SEED=N repeats a run's choices
	go test -c -o dist/soak.test ./cmd/fintrace
	cd cmd/fintrace && $(SUDO) ../../dist/soak.test -test.v -test.timeout 0 -test.run '^TestSoak$$' -soak.duration $(DURATION) -soak.seed $(or $(SEED),0)

clean: ## remove what was built
	rm -rf fintrace dist
