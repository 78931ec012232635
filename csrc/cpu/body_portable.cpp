#define DCLR_ISA portable
#include "body.h"
