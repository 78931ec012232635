#define DCLR_ISA avx512
#include "body.h"
