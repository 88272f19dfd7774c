// Plugin of QEMU's TCG: counts guest instructions by what the kernel executes them for, and by kernel function.
//
//   -plugin FILE.so,map=System.map,out=FILE[,phases=on]
//
// It also counts the instructions that TCG translates, which takes longer than executing them a few times.
//
// The reason is the innermost of: the system call, page fault or interrupt that a task is in, and the functions in
// INNER; or `user`. A task is known by its kernel stack. umask(2), the kernel's start and the execution of the init end
// a window: its counts are appended to the file, and the next window starts. With phases=on, any execve(2) and each
// connection to the host end one as well.
//
// It needs a kernel at fixed addresses, one processor, and CONFIG_VMAP_STACK. The declarations follow the documentation
// of the plugin interface, version 1 (QEMU 4.2 and newer); QEMU offers no header to compile against without its source.
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { NO_REGISTERS = 0, LOADS_AND_STORES = 3 };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
typedef void accessed(unsigned cpu, uint32_t info, uint64_t address, void *data);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, accessed *, int, int, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { MAX_SYMBOLS = 100000, MAX_REASONS = 1000, MAX_TASKS = 4096, MAX_DEPTH = 16, STACK_BITS = 14 };
static const uint64_t KERNEL = 1ull << 63, TEXT = 0xffffffff80000000;

// What the execution of a symbol's first instruction means.
enum action { NOTHING, INNER_FUNCTION, SYSCALL_ENTRY, SYSCALL, EXCEPTION, RETURN, NEW_TASK, THREAD, SWITCH, WINDOW };

// Kernel functions that are reasons of their own within others.
static const char *const INNER[][2] = {
    {"__fuse_simple_request", "virtio-fs request"},       {"fuse_simple_background", "virtio-fs request"},
    {"virtio_fs_requests_done_work", "virtio-fs completion"}, {"flush_tlb_mm_range", "TLB flush"},
    {"switch_mm_irqs_off", "change of address space"},
};

static struct symbol { uint64_t address; char name[64]; enum action action; unsigned reason; } symbols[MAX_SYMBOLS];
static unsigned symbol_count;
static struct reason { char name[64]; uint64_t entries, *counts; } reasons[MAX_REASONS];
static unsigned reason_count;
static struct task { uint64_t stack; unsigned depth, reasons[MAX_DEPTH]; } tasks[MAX_TASKS], *current = tasks;
static unsigned user, entry, new_task, thread;
static uint64_t translated_kernel, translated_user;
static bool phases;
static FILE *out;

static void fail(const char *what) {
    fprintf(stderr, "plugin: %s\n", what);
    exit(1);
}

static unsigned reason(const char *name) {
    for (unsigned i = 0; i < reason_count; i++)
        if (!strcmp(reasons[i].name, name)) return i;
    if (reason_count == MAX_REASONS) fail("too many reasons");
    snprintf(reasons[reason_count].name, sizeof reasons->name, "%s", name);
    reasons[reason_count].counts = calloc(MAX_SYMBOLS, sizeof(uint64_t));
    if (!reasons[reason_count].counts) fail("out of memory");
    return reason_count++;
}

static bool starts(const char *name, const char *prefix) { return !strncmp(name, prefix, strlen(prefix)); }

static void classify(struct symbol *symbol) {
    static const char SYSCALL_PREFIX[] = "__x64_sys_";
    const char *name = symbol->name;
    for (unsigned i = 0; i < sizeof INNER / sizeof *INNER; i++)
        if (!strcmp(name, INNER[i][0])) symbol->action = INNER_FUNCTION, symbol->reason = reason(INNER[i][1]);
    if (starts(name, SYSCALL_PREFIX)) {
        symbol->action = strcmp(name + strlen(SYSCALL_PREFIX), "umask") ? SYSCALL : WINDOW;
        symbol->reason = reason(name + strlen(SYSCALL_PREFIX));
    } else if (!strcmp(name, "asm_exc_page_fault")) {
        symbol->action = EXCEPTION, symbol->reason = reason("page fault");
    } else if (starts(name, "asm_sysvec_") || !strcmp(name, "asm_common_interrupt")) {
        symbol->action = EXCEPTION, symbol->reason = reason("interrupt");
    } else if (starts(name, "asm_exc_")) {
        symbol->action = EXCEPTION, symbol->reason = reason("other exception");
    } else if (!strcmp(name, "restore_regs_and_return_to_kernel")) {
        symbol->action = RETURN;
    } else if (!strcmp(name, "entry_SYSCALL_64")) {
        symbol->action = SYSCALL_ENTRY;
    } else if (!strcmp(name, "ret_from_fork_asm")) {
        symbol->action = NEW_TASK;
    } else if (!strcmp(name, "run_init_process") || !strcmp(name, "start_kernel") ||
               (phases && (!strcmp(name, "vsock_connect") || !strcmp(name, "begin_new_exec")))) {
        symbol->action = WINDOW;
    } else if (!strcmp(name, "kthread")) {
        symbol->action = THREAD;
    } else if (!strcmp(name, "__switch_to_asm")) {
        symbol->action = SWITCH;
    }
}

static int by_address(const void *a, const void *b) {
    uint64_t x = ((const struct symbol *)a)->address, y = ((const struct symbol *)b)->address;
    return x < y ? -1 : x > y;
}

// Symbol 0 stands for user space.
static void read_map(const char *path) {
    FILE *map = fopen(path, "r");
    if (!map) fail("cannot open map=");
    char type;
    struct symbol *last = symbols;
    strcpy(last->name, "user");
    symbol_count = 1;
    while (symbol_count < MAX_SYMBOLS) {
        struct symbol *symbol = &symbols[symbol_count];
        if (fscanf(map, "%" SCNx64 " %c %63[^\n]", &symbol->address, &type, symbol->name) != 3) break;
        fscanf(map, "%*[^\n]");
        if (symbol->address < TEXT || !strchr("tTwW", type)) continue;
        symbol_count++;
    }
    fclose(map);
    qsort(symbols, symbol_count, sizeof *symbols, by_address);
    for (unsigned i = 1; i < symbol_count; i++) classify(&symbols[i]);
}

static unsigned symbol_at(uint64_t address) {
    unsigned low = 0, high = symbol_count;
    while (high - low > 1) {
        unsigned middle = low + (high - low) / 2;
        if (symbols[middle].address <= address) low = middle;
        else high = middle;
    }
    return low;
}

static void switch_to(unsigned cpu, uint32_t info, uint64_t address, void *data) {
    (void)cpu, (void)info, (void)data;
    // Stacks are allocated with vmalloc, but for the first one. Other accesses of the function are to other memory.
    if (!(address >= 0xffffc90000000000 && address < 0xffffe90000000000) && address < TEXT) return;
    uint64_t stack = address >> STACK_BITS;
    if (current->stack == stack) return;
    unsigned at = stack % MAX_TASKS;
    for (unsigned i = 0; tasks[at].stack && tasks[at].stack != stack; at = (at + 1) % MAX_TASKS)
        if (i++ == MAX_TASKS) fail("too many tasks");
    current = &tasks[at];
    if (!current->stack) current->stack = stack, current->depth = 0, current->reasons[0] = thread;
}

static void enter(unsigned level, unsigned reason) {
    if (level >= MAX_DEPTH) fail("exceptions are nested too deeply");
    current->depth = level;
    current->reasons[level] = reason;
    reasons[reason].entries++;
}

// `end` names what ends the window.
static void end_window(const char *end) {
    static unsigned number;
    fprintf(out, "window\t%u\t%s\ntranslated\tkernel\t%" PRIu64 "\ntranslated\tuser\t%" PRIu64 "\n", number++, end,
            translated_kernel, translated_user);
    translated_kernel = translated_user = 0;
    for (unsigned r = 0; r < reason_count; r++) {
        if (reasons[r].entries) fprintf(out, "entries\t%s\t%" PRIu64 "\n", reasons[r].name, reasons[r].entries);
        reasons[r].entries = 0;
        for (unsigned s = 0; s < symbol_count; s++) {
            uint64_t *count = &reasons[r].counts[s];
            if (!*count) continue;
            fprintf(out, "%s\t%s\t%" PRIu64 "\n", reasons[r].name, symbols[s].name, *count);
            *count = 0;
        }
    }
    fflush(out);
}

static void act(unsigned cpu, void *data) {
    (void)cpu;
    struct symbol *symbol = data;
    switch (symbol->action) {
    case SYSCALL_ENTRY: enter(0, entry); break;
    case SYSCALL: if (current->depth == 0) enter(0, symbol->reason); break;
    case INNER_FUNCTION: enter(current->depth + 1, symbol->reason); break;
    case EXCEPTION: enter(current->reasons[current->depth] == user ? 0 : current->depth + 1, symbol->reason); break;
    case RETURN: if (current->depth) current->depth--; break;
    case NEW_TASK: enter(0, new_task); break;
    case THREAD: enter(0, thread); break;
    case WINDOW: end_window(symbol->name); break;
    default: break;
    }
}

// Returns from a function in INNER.
static void leave(unsigned cpu, void *data) {
    (void)cpu;
    if (current->depth && current->reasons[current->depth] == ((struct symbol *)data)->reason) current->depth--;
}

// Whether the instruction is a return, or a jump to another function, such as the one that returns.
static bool leaves(const struct qemu_plugin_insn *insn, unsigned symbol) {
    const uint8_t *code = qemu_plugin_insn_data(insn);
    if (code[0] == 0xc3) return true;
    if (code[0] != 0xe9) return false;
    int32_t distance;
    memcpy(&distance, code + 1, sizeof distance);
    return symbol_at(qemu_plugin_insn_vaddr(insn) + 5 + distance) != symbol;
}

struct block { unsigned symbol, instructions; struct symbol *starts; };

static void execute(unsigned cpu, void *data) {
    struct block *block = data;
    if (!block->symbol) {
        current->depth = 0;
        current->reasons[0] = user;
    } else if (block->starts) {
        act(cpu, block->starts);
    }
    reasons[current->reasons[current->depth]].counts[block->symbol] += block->instructions;
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    uint64_t start = qemu_plugin_tb_vaddr(tb);
    struct block *block = malloc(sizeof *block);
    if (!block) fail("out of memory");
    *block = (struct block){.instructions = qemu_plugin_tb_n_insns(tb)};
    *(start >= KERNEL ? &translated_kernel : &translated_user) += block->instructions;
    if (start >= KERNEL) block->symbol = symbol_at(start);
    if (block->symbol) {
        for (size_t i = 0; i < block->instructions; i++) {
            struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
            uint64_t address = qemu_plugin_insn_vaddr(insn);
            struct symbol *symbol = &symbols[symbol_at(address)];
            if (symbol->action == SWITCH) {
                qemu_plugin_register_vcpu_mem_cb(insn, switch_to, NO_REGISTERS, LOADS_AND_STORES, NULL);
            } else if (symbol->action != NOTHING && symbol->address == address) {
                if (i == 0) block->starts = symbol;
                else qemu_plugin_register_vcpu_insn_exec_cb(insn, act, NO_REGISTERS, symbol);
            } else if (symbol->action == INNER_FUNCTION && leaves(insn, symbol - symbols)) {
                qemu_plugin_register_vcpu_insn_exec_cb(insn, leave, NO_REGISTERS, symbol);
            }
        }
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, NO_REGISTERS, block);
}

static void at_exit(qemu_plugin_id_t id, void *data) {
    (void)id, (void)data;
    end_window("exit");
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv) {
    (void)info;
    user = reason("user");
    entry = reason("system call entry");
    new_task = reason("new task");
    thread = reason("kernel thread");
    current->reasons[0] = thread;
    const char *map = NULL;
    for (int i = 0; i < argc; i++) {
        if (starts(argv[i], "map=")) map = argv[i] + 4;
        else if (starts(argv[i], "out=")) out = fopen(argv[i] + 4, "w");
        else if (!strcmp(argv[i], "phases=on")) phases = true;
        else fail("the arguments are map=, out= and phases=on");
    }
    if (map) read_map(map);
    if (symbol_count < 2 || !out) fail("map= or out= is missing or unusable");
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, at_exit, NULL);
    return 0;
}
