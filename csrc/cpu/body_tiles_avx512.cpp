#define DCLR_ISA tiles_avx512
#define DCLR_TILES
#include "body.h"
