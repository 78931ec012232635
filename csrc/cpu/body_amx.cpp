#define DCLR_ISA amx
#define DCLR_TILES
#define DCLR_AMX  // compilers have different macros for it
#include "body.h"
