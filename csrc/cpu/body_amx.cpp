#define DCLR_ISA amx
#define DCLR_TILES
#include "body.h"
