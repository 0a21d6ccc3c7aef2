// Constants of the classes of policy "gittins", for gittins.cpp and the test that they are gittins.GittinsSetting's.
#pragma once
#include "reuse.h"

namespace pagemill {

struct GittinsSetting {
    std::vector<int64_t> lengths = {4096, 8192, 16384, 49152};
    std::vector<double> once = {1.0, 0.8, 0.6, 0.5, 0.4};
    double part_filled = 0.1, continued = 0.15;
    std::vector<double> again = {2.83, 5.2, 8.0, 14.7, 36.5, 89.4};
    int64_t known_blocks = 2;
    LearnerSetting learner;
};

}  // namespace pagemill
