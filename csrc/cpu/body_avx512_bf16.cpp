#define DCLR_ISA avx512_bf16
#include "body.h"
