#define DCLR_ISA tiles
#define DCLR_TILES
#include "body.h"
