// The kernels of one variant as a shared library: launch(name, grid, block, arguments, ...), arguments as cuLaunchKernel
// takes them (one pointer to each value).
#define INTERVAL_SHIM
#include KERNEL_SOURCE

#include <utility>

namespace {

struct Entry {
    const char* name;
    int parameters;
    void (*call)(void**);
};

template <class... P, size_t... I>
void call_with(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*(P*)arguments[I]...);
}

template <auto KERNEL>
struct Unpack;
template <class... P, void (*KERNEL)(P...)>
struct Unpack<KERNEL> {
    static constexpr int count = sizeof...(P);
    static void call(void** arguments) { call_with(KERNEL, arguments, std::make_index_sequence<sizeof...(P)>()); }
};

#define ENTRY(kernel) {#kernel, Unpack<&kernel>::count, Unpack<&kernel>::call}

const Entry ENTRIES[] = {
#if VARIANT == 0
    ENTRY(dense_plain), ENTRY(conv_plain),
#else
    ENTRY(dense_thin), ENTRY(conv_thin), ENTRY(conv_few_thin),
#ifndef ONLY_THIN
    ENTRY(dense_wide), ENTRY(dense_narrow), ENTRY(conv_wide), ENTRY(conv_narrow), ENTRY(conv_few_narrow),
    ENTRY(network_64), ENTRY(network_128),
#endif
#endif
};

}  // namespace

extern "C" const char* shim_message() { return shim::message; }

// How many arguments a kernel takes; -1 if there is none of this name.
extern "C" int shim_parameters(const char* name) {
    for (const Entry& entry : ENTRIES)
        if (!strcmp(entry.name, name)) return entry.parameters;
    return -1;
}

// `begins`, `sizes`: the arrays that the kernel may read. 0, or 1 with a message. An odd seed runs warps ahead.
extern "C" int shim_launch(const char* name, uint32 grid_x, uint32 grid_y, uint32 block, size_t shared, uint32 seed,
                           void** arguments, const char** begins, const size_t* sizes, int count) {
    shim::arrays.clear();
    for (int i = 0; i < count; i++) shim::arrays.push_back({begins[i], sizes[i]});
    for (const Entry& entry : ENTRIES)
        if (!strcmp(entry.name, name))
            return shim::launch({grid_x, grid_y, 1}, {block, 1, 1}, shared, seed, [&] { entry.call(arguments); });
    snprintf(shim::message, sizeof shim::message, "no kernel '%s'", name);
    return 1;
}
