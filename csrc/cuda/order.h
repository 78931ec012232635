// Which tiles of S a launch takes and in which order: clusters of two tile rows, eight clusters of
// rows at a time and column after column in them, so that tiles under way together share their
// operands in L2. Nothing is rounded up beyond the cluster, and of a view with itself (`upper`) only
// clusters with an entry beyond the diagonal are taken.
#pragma once

#include "warp.h"

namespace directclr {

constexpr int kClusterTiles = 2;

DIRECTCLR_HD int least(int a, int b) { return a < b ? a : b; }

struct TileOrder {
  static constexpr int kGroup = 8;
  int rows = 0, columns = 0;  // of clusters
  int per_column = 0;         // with `upper`: so many rows of clusters are as high as one is wide

  struct Cluster {
    int row, column;
  };

  TileOrder() = default;
  // Of m x n entries; kClusterTiles * tile_height divides tile_width.
  DIRECTCLR_HD TileOrder(int m, int n, int tile_height, int tile_width, bool upper)
      : rows((m + kClusterTiles * tile_height - 1) / (kClusterTiles * tile_height)),
        columns((n + tile_width - 1) / tile_width),
        per_column(upper ? tile_width / (kClusterTiles * tile_height) : 0) {}

  // The first column that a row of clusters needs.
  DIRECTCLR_HD int first(int row) const { return per_column ? row / per_column : 0; }
  // How many of the `height` rows from `row` on need a column.
  DIRECTCLR_HD int needing(int row, int height, int column) const {
    return per_column ? least(height, (column + 1) * per_column - row) : height;
  }
  DIRECTCLR_HD int clusters(int row, int height) const {
    int sum = height * columns;
    for (int r = row; per_column && r < row + height; ++r) sum -= first(r);
    return sum;
  }
  DIRECTCLR_HD int clusters() const { return clusters(0, rows); }

  // Finds clusters by their place in the order, each not before the last one found.
  struct Walk {
    int start = 0, row = 0;  // of the group of rows under way

    DIRECTCLR_HD Cluster to(const TileOrder& order, int place) {
      int height = least(kGroup, order.rows - row), size = order.clusters(row, height);
      while (place - start >= size) {
        start += size;
        row += height;
        height = least(kGroup, order.rows - row);
        size = order.clusters(row, height);
      }
      int rest = place - start, column = order.first(row);
      for (int n; (n = order.needing(row, height, column)) < height; ++column) {
        if (rest < n) return {row + rest, column};
        rest -= n;
      }
      return {row + rest % height, column + rest / height};
    }
  };
};

}  // namespace directclr
