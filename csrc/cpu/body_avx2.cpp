#define DCLR_ISA avx2
#include "body.h"
