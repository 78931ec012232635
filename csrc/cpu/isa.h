// Which body of the kernels runs.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace directclr {

std::vector<const Kernels*> available_kernels();  // best first
const Kernels& kernels();                         // the one in use: the best, unless forced
const char* matrix_unit();                        // whether it can be used, or why not
std::string force_isa(const std::string& name);   // error text, empty if done; "" undoes

}  // namespace directclr
