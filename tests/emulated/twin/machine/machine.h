// A host stand-in for one GPU: what the twin's arch/ headers are built on. Every CUDA thread is a fiber of one host thread, so that a
// kernel runs deterministically for a given seed, in any interleaving that the programming model allows.
#pragma once

#include <stdint.h>

namespace twin {

constexpr int kLanes = 32;

// The place in the kernel's sources that called into the twin; arch functions take it as a defaulted last argument.
struct Where {
  const char* file;
  int line;
  constexpr Where(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

// Stops the launch; the message reaches Python with the thread and `where` in front.
[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

int grid_size();
int block_index();
int thread_index();  // in its block
int cluster_rank();

// ---- meetings of threads ------------------------------------------------------------------------------------------------------------

// Waits for all lanes of the warp at the same line; the lane that arrives last calls `complete` on what each lane brought.
void meet(const char* verb, void* mine, void (*complete)(void* const* lanes), Where where);

template <typename Operands, void (*complete)(Operands* const* lanes)>
void meet(const char* verb, Operands& mine, Where where) {
  meet(
      verb, &mine,
      [](void* const* erased) {
        Operands* lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<Operands*>(erased[lane]);
        complete(lanes);
      },
      where);
}

void warp_barrier(Where where);
void block_barrier(Where where);
void cluster_barrier(Where where);

// Lets others run until *value == expected.
void wait_until_equal(const int* value, int expected, Where where);

// ---- shared memory: bounds, alignment and races are checked -------------------------------------------------------------------------

// The first shared address of the running block. As on the device, its high bits name the block: its rank in the cluster.
uint32_t shared_base();

void read_shared(uint32_t address, void* to, int bytes, Where where);
void write_shared(uint32_t address, const void* from, int bytes, Where where);
// The same on behalf of another lane of the warp, inside a meeting.
void read_shared_for_lane(int lane, uint32_t address, void* to, int bytes, Where where);
void write_shared_for_lane(int lane, uint32_t address, const void* from, int bytes, Where where);

// ---- global memory: bounds, alignment and write permission are checked --------------------------------------------------------------

void read_global(const void* from, void* to, int bytes, Where where);
void write_global(void* to, const void* from, int bytes, Where where);

// ---- asynchronous copies: the bytes land at the wait that guarantees them, and are poison until then ----------------------------------

// A null `from` writes zeros.
void begin_copy(uint32_t address, const void* from, int bytes, Where where);
void commit_copies();
void wait_for_copies(int pending_groups);

// ---- Hopper: barriers in shared memory and by number --------------------------------------------------------------------------------

void init_barrier(uint32_t address, int arrivals, Where where);
void fence_barrier_init();
void arrive_at_barrier(uint32_t address, int expected_bytes, Where where);
void wait_for_phase(uint32_t address, uint32_t parity, Where where);
void named_barrier(int id, int threads, bool waits, Where where);
void lower_registers(int count, Where where);
void raise_registers(int count, Where where);

// ---- Hopper: copies of the engine. They read and write at moments of their own, no later than a wait guarantees ---------------------

void check_map(const void* map, Where where);
void copy_box_to_shared(uint32_t address, const void* map, uint32_t barrier, int column, int row, int head, int batch, Where where);
void copy_bytes_to_shared(uint32_t address, const void* global, int bytes, uint32_t barrier, Where where);
void copy_box_to_global(const void* map, uint32_t address, int column, int row, int head, int batch, Where where);
void copy_bytes_to_global(uint32_t address, void* global, int bytes, Where where);
void add_floats_to_global(void* global, uint32_t address, int bytes, Where where);
void commit_departures();
void wait_until_read(int pending_groups);
void wait_until_written();
void fence_proxy();

// ---- Hopper: the shared memory of another block of the cluster ----------------------------------------------------------------------

// The cluster's address of what the running block has at `address`, in the block of a rank.
uint32_t address_in_cluster(uint32_t address, int rank, Where where);
void arrive_in_cluster(uint32_t cluster_address, int expected_bytes, Where where);
// Writes a word at a moment of the engine's own, and completes its bytes on a barrier of the same block.
void send_word(uint32_t cluster_address, uint32_t word, uint32_t cluster_barrier, Where where);
// Bit r of `ranks`: the box comes to the block of rank r, and completes its bytes on the barrier there.
void copy_box_to_cluster(uint32_t address, const void* map, uint32_t barrier, int column, int row, int head, int batch,
                         uint32_t ranks, Where where);

// ---- Hopper: products of warpgroups -------------------------------------------------------------------------------------------------

struct ProductOperands {
  uint64_t a, b;  // descriptors; a only where left_in_shared
  int columns;
  bool left_in_shared;    // else in registers
  bool right_along_rows;  // whether the contraction runs along the rows of the right operand, or along its columns
  bool is_float16;
  bool accumulate;
  Where where;
};

struct ProductLane {
  ProductOperands operands;
  float* accumulators;
  const uint32_t* registers;  // the left operand where it is not in shared memory
};

void start_product(ProductLane& lane);
void fence_products(Where where);
void commit_products(Where where);
void wait_for_products(int pending_groups, Where where);

// ---- launches: the one entry point that Python calls --------------------------------------------------------------------------------

struct Allocation {
  uint64_t base;
  uint64_t bytes;
  uint64_t writable;
};

// Mirrored by LaunchOptions in twin.py.
struct Launch {
  int grid;
  int threads;
  int shared_bytes;
  int resident_blocks;  // that run interleaved, rounded up to whole clusters; they start in the order of their index
  uint64_t seed;
  int detect_races;
  int num_allocations;
  const Allocation* allocations;  // what global accesses may touch
  char* message;                  // receives the error of a failed launch
  int message_bytes;
};

// Returns 0, or 1 with an error in launch.message.
int run(const Launch& launch, int blocks_of_cluster, void (*kernel)(const void* params), const void* params);

// Python's copy of the parameters need not be aligned as the struct asks.
template <typename Params>
void call(void (*kernel)(Params), const void* params) {
  alignas(Params) unsigned char aligned[sizeof(Params)];
  __builtin_memcpy(aligned, params, sizeof(Params));
  kernel(*reinterpret_cast<const Params*>(aligned));
}

// Declared in front of each kernel, as ClusterShape; kernels of one text have clusters of one size.
template <int size>
struct ClusterOf {
  static constexpr int kBlocks = size;
};

}  // namespace twin

// Makes `kernel` callable from Python as `launch_<kernel>`.
#define TWIN_EXPORT(kernel)                                                                                               \
  extern "C" __attribute__((visibility("default"))) int launch_##kernel(const twin::Launch* launch, const void* params) { \
    return twin::run(*launch, ::ClusterShape::kBlocks, [](const void* bytes) { twin::call(kernel, bytes); }, params);     \
  }
