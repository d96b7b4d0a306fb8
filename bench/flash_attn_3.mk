# flash-attn 3 for Hopper, of which no wheel is published: heads of 128 in bf16 alone, varlen, forward and backward.
# Five minutes of two cores; one file for every Python from 3.9 and every torch from 2.9 (torch's stable interface).
#
#   make -j2 -f bench/flash_attn_3.mk FLASH=flash-attention CUTLASS=flash-attention/csrc/cutlass OUT=fa3
#   PYTHONPATH=$PWD/fa3 python bench/bench_train.py
#
# FLASH is a checkout of github.com/Dao-AILab/flash-attention with its submodule cutlass, CUDA a toolkit of torch's major version,
# PYTHON one that has torch. `nvcc` of the wheels nvidia-cuda-nvcc, -crt, -cccl and nvidia-nvvm will do (CUDA=.../nvidia/cu13), with
# the headers beside it that torch's own wheels bring (nvidia/cu13/include).
FLASH ?= flash-attention
CUTLASS ?= $(FLASH)/csrc/cutlass
CUDA ?= /usr/local/cuda
PYTHON ?= python3
OUT ?= fa3

TORCH := $(shell $(PYTHON) -c "import torch; print(torch.__path__[0])")
HEADERS := $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('include'))")
LEFT_OUT := SPLIT PAGEDKV APPENDKV LOCAL SOFTCAP FP16 FP8 HDIM64 HDIM96 HDIM192 HDIM256 SM8x
KEPT := HDIM128 BACKWARD VARLEN CLUSTER PACKGQA
DEFINES := $(addprefix -DFLASHATTENTION_DISABLE_,$(LEFT_OUT) HDIMDIFF64 HDIMDIFF192)
INCLUDES := $(addprefix -I,$(FLASH)/hopper $(CUTLASS)/include $(TORCH)/include $(TORCH)/include/torch/csrc/api/include \
	$(CUDA)/include $(CUDA)/include/cccl $(HEADERS))
NVCC := $(CUDA)/bin/nvcc -O3 -std=c++17 --use_fast_math -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DNDEBUG \
	-DCUTLASS_ENABLE_GDC_FOR_SM90 -DCUTLASS_DEBUG_TRACE_LEVEL=0 -gencode arch=compute_90a,code=sm_90a \
	--expt-relaxed-constexpr --expt-extended-lambda -Xcompiler -fPIC -DTORCH_EXTENSION_NAME=_C
KERNELS := instantiations/flash_fwd_hdim128_bf16_sm90 instantiations/flash_fwd_hdim128_bf16_packgqa_sm90 \
	instantiations/flash_bwd_hdim128_bf16_sm90 flash_prepare_scheduler
OBJECTS := $(addprefix $(OUT)/build/,$(addsuffix .o,$(notdir $(KERNELS)) flash_api_stable))

all: $(OUT)/flash_attn_3/_C.abi3.so $(OUT)/flash_attn_config.py
	cp $(FLASH)/hopper/flash_attn_interface.py $(OUT)/
	cp $(FLASH)/hopper/flash_attn_3/*.py $(OUT)/flash_attn_3/

$(OUT)/build $(OUT)/flash_attn_3:
	mkdir -p $@

$(OUT)/build/flash_api_stable.o: $(FLASH)/hopper/flash_api_stable.cpp | $(OUT)/build
	$(CXX) -O3 -std=c++17 -fPIC -DPy_LIMITED_API=0x03090000 -DTORCH_TARGET_VERSION=0x0209000000000000 -DUSE_CUDA \
		-DTORCH_EXTENSION_NAME=_C $(DEFINES) $(INCLUDES) -c $< -o $@

$(OUT)/build/%.o: $(FLASH)/hopper/instantiations/%.cu | $(OUT)/build
	$(NVCC) $(DEFINES) $(INCLUDES) -c $< -o $@

$(OUT)/build/%.o: $(FLASH)/hopper/%.cu | $(OUT)/build
	$(NVCC) $(DEFINES) $(INCLUDES) -c $< -o $@

$(OUT)/flash_attn_3/_C.abi3.so: $(OBJECTS) | $(OUT)/flash_attn_3
	$(CXX) -shared -o $@ $(OBJECTS) -L$(TORCH)/lib -lc10 -ltorch -ltorch_cpu -ltorch_cuda -lc10_cuda \
		$(firstword $(wildcard $(CUDA)/lib64/libcudart.so $(CUDA)/lib/libcudart.so*))

$(OUT)/flash_attn_config.py: | $(OUT)/flash_attn_3
	$(PYTHON) -c "flags = dict.fromkeys('$(LEFT_OUT)'.split(), True) | dict.fromkeys('$(KEPT)'.split(), False); \
	print('CONFIG =', {'build_flags': {f'FLASHATTENTION_DISABLE_{name}': off for name, off in flags.items()}})" > $@
