// SPDX-License-Identifier: GPL-2.0
/*
 * Measures what it costs to lend a buffer to a device: through the region of a
 * virtio device (the mapping operations that virtio_swiotlb gave it), through
 * the DMA API (kernel/dma/swiotlb.c when the guest runs with swiotlb=force), and
 * as bare copies.
 *
 * It binds to virtio devices of a type that no other driver has, and does
 * nothing with them until it is told to:
 *
 *   echo COMMAND > /sys/kernel/debug/swiotlb_bench/run
 *   cat /sys/kernel/debug/swiotlb_bench/results      JSON lines
 *
 *   region    instruction counts, for each device
 *   swiotlb   instruction counts, through the DMA API of the first device
 *   scaling   operations in a second on one CPU and on two
 *   hammer    all CPUs map, check and unmap; fails if a byte is not as it must be
 *
 * Instructions are read by get_cycles(): the time stamp counter of x86, the generic
 * timer's of arm64. QEMU with -icount shift=0 advances either by one for each
 * instruction, if that of arm64 runs at 1 GHz. "region" and "swiotlb" refuse to run
 * otherwise.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cleanup.h>
#include <linux/completion.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/prandom.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/timex.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/vmalloc.h>

#define BENCH_ID	63	/* no device type of the standard */
#define BOUNCE_BAR	4	/* where the reference device has its region */
#define MAX_DEVICES	4
#define OUTSTANDING	64
#define LONGEST_BURST	256
#define STEPS		2048
#define REFUSALS	1000
#define CHURN		20000
#define GIVE_UP		64	/* refusals in a row that end a fill */
#define LARGEST		SZ_64K
#define RESULTS		SZ_256K
#define ROUNDS		5

/* --- what is measured --- */

/*
 * A way to lend a buffer to a device, in the form in which the virtio core knows
 * them: the operations of a device, and what they are called with.
 */
struct way {
	const char *name;
	const struct virtio_map_ops *ops;
	union virtio_map token;
	size_t pool;			/* bytes */
	void *region;
	phys_addr_t region_start;
};

static inline dma_addr_t map(const struct way *way, struct page *page, size_t len,
			     enum dma_data_direction dir)
{
	return way->ops->map_page(way->token, page, 0, len, dir, 0);
}

static inline void unmap(const struct way *way, dma_addr_t at, size_t len,
			 enum dma_data_direction dir)
{
	way->ops->unmap_page(way->token, at, len, dir, 0);
}

/* The DMA API, as the virtio core calls it for devices without operations. */

static dma_addr_t dma_map(union virtio_map token, struct page *page, unsigned long offset,
			  size_t len, enum dma_data_direction dir, unsigned long attrs)
{
	return dma_map_page_attrs(token.dma_dev, page, offset, len, dir,
				  attrs | DMA_ATTR_NO_WARN);
}

static void dma_unmap(union virtio_map token, dma_addr_t at, size_t len,
		      enum dma_data_direction dir, unsigned long attrs)
{
	dma_unmap_page_attrs(token.dma_dev, at, len, dir, attrs);
}

static const struct virtio_map_ops dma_ops = { .map_page = dma_map, .unmap_page = dma_unmap };

/* Nothing, to know what the loops cost. */

static dma_addr_t none_map(union virtio_map token, struct page *page, unsigned long offset,
			   size_t len, enum dma_data_direction dir, unsigned long attrs)
{
	return 0;
}

static void none_unmap(union virtio_map token, dma_addr_t at, size_t len,
		       enum dma_data_direction dir, unsigned long attrs)
{
}

static const struct virtio_map_ops none_ops = { .map_page = none_map, .unmap_page = none_unmap };

/* Copies of every page to where a token points: no pool, no lock. */

static dma_addr_t copy_map(union virtio_map token, struct page *page, unsigned long offset,
			   size_t len, enum dma_data_direction dir, unsigned long attrs)
{
	memcpy(token.group, page_address(page), len);
	return (dma_addr_t)page_address(page);
}

static void copy_unmap(union virtio_map token, dma_addr_t at, size_t len,
		       enum dma_data_direction dir, unsigned long attrs)
{
	if (dir != DMA_TO_DEVICE)
		memcpy((void *)at, token.group, len);
}

static const struct virtio_map_ops copy_ops = { .map_page = copy_map, .unmap_page = copy_unmap };

static struct way ways[MAX_DEVICES];
static unsigned int devices;

/* --- results --- */

static DEFINE_MUTEX(lock);
static char *results;
static size_t results_len;

static __printf(1, 2) void result_printk(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	results_len += vscnprintf(results + results_len, RESULTS - results_len, fmt, args);
	va_end(args);
}

/* --- counting --- */

static const u32 lens[] = { 1, 16, 60, 64, 1536, 4096, 16384, 65536 };
static u32 copy_cost[ARRAY_SIZE(lens)];
static u32 clock_cost;
static struct page *buffer, *other_buffer;

static u32 cost_of(u32 len)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(lens); i++)
		if (lens[i] == len)
			return copy_cost[i];
	return 0;
}

/* The bare copies that are part of a map, whatever the direction, and an unmap. */
static u32 map_copies(u32 len)
{
	return cost_of(len);
}

static u32 unmap_copies(u32 len, enum dma_data_direction dir)
{
	return dir == DMA_TO_DEVICE ? 0 : cost_of(len);
}

static u64 now(void)
{
	return get_cycles();
}

static noinline u64 count_nops(void)
{
	u64 begin = now();

	asm volatile(".rept 10000\n\tnop\n\t.endr");
	return now() - begin;
}

static int calibrate(void)
{
	void *to = page_address(other_buffer), *from = page_address(buffer);
	u64 nops, begin;

	scoped_guard(irqsave)
		nops = count_nops();
	if (nops < 10000 || nops > 10100) {
		pr_err("10000 instructions took %llu: run the guest with -icount shift=0\n", nops);
		return -EOPNOTSUPP;
	}
	/* Interrupts would count, too. */
	guard(irqsave)();
	begin = now();
	clock_cost = now() - begin;
	for (unsigned int i = 0; i < ARRAY_SIZE(lens); i++) {
		u32 len = lens[i];

		/* Called as the module calls it: the length is not a constant. */
		OPTIMIZER_HIDE_VAR(len);
		begin = now();
		for (unsigned int n = 0; n < 16; n++) {
			memcpy(to, from, len);
			barrier();
		}
		copy_cost[i] = (now() - begin) / 16;
		result_printk("{\"kind\":\"copy\",\"len\":%u,\"instructions\":%u}\n", len,
			      copy_cost[i]);
	}
	return 0;
}

struct held {
	dma_addr_t at;
	u32 len;
	u32 dir;
};

struct run {
	const struct way *way;
	struct rnd_state random;
	struct held *held;
	size_t count, max;
	u64 bytes, full_bytes;
	/* what all calls cost so far, less their copies */
	s64 spent;
	/* the dearest of them, and what for */
	s64 longest_map, longest_unmap, first_refusal;
	u32 longest_map_len, longest_unmap_len;
	u64 refused;
};

static u32 below(struct run *run, u32 end)
{
	return ((u64)prandom_u32_state(&run->random) * end) >> 32;
}

/* A map whose cost is looked at. */
static dma_addr_t watched_map(struct run *run, u32 len, enum dma_data_direction dir)
{
	unsigned long flags;
	dma_addr_t at;
	s64 cost;

	local_irq_save(flags);
	cost = -now();
	at = map(run->way, buffer, len, dir);
	cost += now();
	local_irq_restore(flags);
	cost -= clock_cost;
	if (at != DMA_MAPPING_ERROR) {
		cost -= map_copies(len);
	} else if (!run->refused++) {
		/* With what is said in the log, which is said once. */
		run->first_refusal = cost;
		return at;
	}
	run->spent += cost;
	if (cost > run->longest_map) {
		run->longest_map = cost;
		run->longest_map_len = len;
	}
	return at;
}

static void watched_unmap(struct run *run, struct held *held)
{
	unsigned long flags;
	s64 cost;

	local_irq_save(flags);
	cost = -now();
	unmap(run->way, held->at, held->len, held->dir);
	cost += now();
	local_irq_restore(flags);
	cost -= clock_cost + unmap_copies(held->len, held->dir);
	run->spent += cost;
	if (cost > run->longest_unmap) {
		run->longest_unmap = cost;
		run->longest_unmap_len = held->len;
	}
}

/* --- filling the pool --- */

/* len, or 0 for 60, 25 and 15 % of 4, 16 and 64 KiB */
static bool take(struct run *run, u32 len)
{
	u32 dir = below(run, 2) ? DMA_FROM_DEVICE : DMA_TO_DEVICE;
	u32 percent = below(run, 100);
	dma_addr_t at;

	if (!len)
		len = percent < 60 ? SZ_4K : percent < 85 ? SZ_16K : SZ_64K;
	if (run->count == run->max)
		return false;
	at = watched_map(run, len, dir);
	if (at == DMA_MAPPING_ERROR)
		return false;
	run->held[run->count++] = (struct held){ at, len, dir };
	run->bytes += len;
	return true;
}

static void drop(struct run *run, size_t which)
{
	watched_unmap(run, &run->held[which]);
	run->bytes -= run->held[which].len;
	run->held[which] = run->held[--run->count];
}

static void fill(struct run *run, u32 len)
{
	unsigned int refused = 0;
	u64 n = 0;

	while (refused < GIVE_UP && run->count < run->max) {
		refused = take(run, len) ? 0 : refused + 1;
		if (!(n++ % 1024))
			cond_resched();
	}
	run->full_bytes = run->bytes;
}

static void thin(struct run *run, u32 len, u32 percent)
{
	u64 want = div_u64(run->full_bytes * percent, 100);
	u64 n = 0;

	while (run->count && run->bytes > want) {
		drop(run, below(run, run->count));
		if (!(n++ % 1024))
			cond_resched();
	}
	if (!percent)
		return;
	run->spent = 0;
	for (n = 0; n < CHURN; n++) {
		if (run->count)
			drop(run, below(run, run->count));
		take(run, len);
		if (!(n % 1024))
			cond_resched();
	}
	result_printk("{\"kind\":\"churn\",\"way\":\"%s\",\"pool\":%zu,\"fill\":\"%s\",\"occupancy\":%u,\"len\":%u,\"steps\":%u,\"instructions\":%lld,\"copies\":0}\n",
		      run->way->name, run->way->pool, len ? "single" : "mixed", percent, len, CHURN,
		      run->spent);
}

/* --- one figure --- */

struct figure {
	const char *fill;
	u32 occupancy;
};

/*
 * Mappings of one length. `burst` of them come back, the oldest first, and as many are
 * taken. Nothing is measured if so many do not fit.
 */
static void measure(struct run *run, const struct figure *figure, unsigned int burst, u32 len,
		    enum dma_data_direction dir)
{
	static dma_addr_t out[LONGEST_BURST];
	unsigned int outstanding = max(burst, OUTSTANDING), many = 0, steps = 0;
	const struct way *way = run->way;
	u64 total = 0, copies = 0;

	while (many < outstanding) {
		out[many] = map(way, buffer, len, dir);
		if (out[many] == DMA_MAPPING_ERROR)
			break;
		many++;
	}
	while (many >= burst && steps < STEPS) {
		unsigned long flags;
		u64 begin;

		local_irq_save(flags);
		begin = now();
		for (dma_addr_t *at = out; at + burst <= out + many; at += burst) {
			unsigned int n;

			for (n = 0; n < burst; n++)
				unmap(way, at[n], len, dir);
			/* What was there before must fit. */
			for (n = 0; n < burst; n++)
				at[n] = map(way, buffer, len, dir);
			steps += burst;
		}
		total += now() - begin - clock_cost;
		local_irq_restore(flags);
		cond_resched();
	}
	for (unsigned int n = 0; n < many; n++)
		if (!WARN_ON(out[n] == DMA_MAPPING_ERROR))
			unmap(way, out[n], len, dir);
	copies = steps * (map_copies(len) + unmap_copies(len, dir));
	if (steps)
		result_printk("{\"kind\":\"map\",\"way\":\"%s\",\"pool\":%zu,\"fill\":\"%s\",\"occupancy\":%u,\"burst\":%u,\"len\":%u,\"from_device\":%s,\"outstanding\":%u,\"steps\":%u,\"instructions\":%llu,\"copies\":%llu}\n",
			      way->name, way->pool, figure->fill, figure->occupancy, burst, len,
			      dir == DMA_FROM_DEVICE ? "true" : "false", many, steps, total,
			      copies);
}

/* A request for which there is no room, made again and again. */
static void measure_refusals(struct run *run, const struct figure *figure, u32 len)
{
	const struct way *way = run->way;
	unsigned int refused = 0;
	unsigned long flags;
	u64 total;

	local_irq_save(flags);
	total = -now();
	for (unsigned int n = 0; n < REFUSALS; n++) {
		dma_addr_t at = map(way, buffer, len, DMA_FROM_DEVICE);

		if (at == DMA_MAPPING_ERROR)
			refused++;
		else
			unmap(way, at, len, DMA_FROM_DEVICE);
	}
	total += now() - clock_cost;
	local_irq_restore(flags);
	result_printk("{\"kind\":\"refusal\",\"way\":\"%s\",\"pool\":%zu,\"fill\":\"%s\",\"occupancy\":%u,\"len\":%u,\"steps\":%u,\"refused\":%u,\"instructions\":%llu,\"copies\":0}\n",
		      way->name, way->pool, figure->fill, figure->occupancy, len, REFUSALS, refused,
		      total);
}

/* A block read as virtio-blk makes it: header, data, status, descriptor table. */
static const struct {
	u32 len;
	enum dma_data_direction dir;
} parts[] = {
	{ 16, DMA_TO_DEVICE },
	{ SZ_4K, DMA_FROM_DEVICE },
	{ 1, DMA_FROM_DEVICE },
	{ 64, DMA_TO_DEVICE },
};

#define PARTS ARRAY_SIZE(parts)

struct read {
	dma_addr_t at[PARTS];
};

static void end_read(const struct way *way, const struct read *read, unsigned int many)
{
	/* The table first, as the core does. */
#pragma GCC unroll 4
	while (many--)
		unmap(way, read->at[many], parts[many].len, parts[many].dir);
}

static bool begin_read(const struct way *way, struct read *read)
{
#pragma GCC unroll 4
	for (unsigned int i = 0; i < PARTS; i++) {
		read->at[i] = map(way, buffer, parts[i].len, parts[i].dir);
		if (read->at[i] == DMA_MAPPING_ERROR) {
			end_read(way, read, i);
			return false;
		}
	}
	return true;
}

static void measure_read(struct run *run, const struct figure *figure, unsigned int burst)
{
	const struct way *way = run->way;
	static struct read reads[OUTSTANDING];
	unsigned int many = 0, steps = 0;
	u64 total = 0, copies = 0;
	bool fits = true;

	while (many < OUTSTANDING && begin_read(way, &reads[many]))
		many++;
	while (many >= burst && fits && steps < STEPS) {
		unsigned long flags;
		u64 begin;

		local_irq_save(flags);
		begin = now();
		for (struct read *at = reads; fits && at + burst <= reads + many; at += burst) {
			unsigned int n;

			for (n = 0; n < burst; n++)
				end_read(way, &at[n], PARTS);
			/* What was there before must fit. */
			for (n = 0; fits && n < burst; n++)
				fits = begin_read(way, &at[n]);
			steps += burst;
		}
		total += now() - begin - clock_cost;
		local_irq_restore(flags);
		cond_resched();
	}
	/* Without all of them nothing is known of those that are left. */
	if (WARN_ON(!fits))
		return;
	for (unsigned int n = 0; n < many; n++)
		end_read(way, &reads[n], PARTS);
	for (unsigned int n = 0; n < PARTS; n++)
		copies += map_copies(parts[n].len) +
			  unmap_copies(parts[n].len, parts[n].dir);
	copies *= steps;
	if (steps)
		result_printk("{\"kind\":\"read\",\"way\":\"%s\",\"pool\":%zu,\"fill\":\"%s\",\"occupancy\":%u,\"burst\":%u,\"outstanding\":%u,\"steps\":%u,\"instructions\":%llu,\"copies\":%llu}\n",
			      way->name, way->pool, figure->fill, figure->occupancy, burst, many,
			      steps, total, copies);
}

static void measure_all(struct run *run, const struct figure *figure, unsigned int burst,
			const u32 *which, unsigned int count)
{
	for (unsigned int i = 0; i < count; i++) {
		measure(run, figure, burst, which[i], DMA_TO_DEVICE);
		measure(run, figure, burst, which[i], DMA_FROM_DEVICE);
		cond_resched();
	}
}

static const u32 burst_sizes[] = { 64, 1536, 4096, 65536 };
static const unsigned int bursts[] = { 8, 64, LONGEST_BURST };

static void measure_bursts(struct run *run, const struct figure *figure)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(bursts); i++) {
		measure_all(run, figure, bursts[i], burst_sizes, ARRAY_SIZE(burst_sizes));
		measure_read(run, figure, bursts[i]);
	}
}

/* How many reads and small packets fit at once. */
static void measure_capacity(struct run *run)
{
	struct read *reads = (struct read *)run->held;
	size_t max = run->max * sizeof(*run->held) / sizeof(*reads);
	size_t fit = 0, packets = 0;

	while (fit < max && begin_read(run->way, &reads[fit]))
		fit++;
	for (size_t i = 0; i < fit; i++)
		end_read(run->way, &reads[i], PARTS);
	while (packets < run->max) {
		dma_addr_t at = map(run->way, buffer, 60, DMA_TO_DEVICE);

		if (at == DMA_MAPPING_ERROR)
			break;
		run->held[packets++].at = at;
	}
	for (size_t i = 0; i < packets; i++)
		unmap(run->way, run->held[i].at, 60, DMA_TO_DEVICE);
	result_printk("{\"kind\":\"capacity\",\"way\":\"%s\",\"pool\":%zu,\"reads\":%zu,\"packets\":%zu}\n",
		      run->way->name, run->way->pool, fit, packets);
}

/* --- instruction counts of one way --- */

static const u32 sizes[] = { 16, 64, 1536, 4096, 16384, 65536 };
/* Filled with 64 bytes, a pool is as if filled with 16: a granule each. */
static const u32 fills[] = { 64, 1536, 4096, 16384, 65536 };
static const u32 occupancies[] = { 90, 50 };
static const u32 refused_sizes[] = { 65536, 4096, 64 };

static int count(const struct way *way, bool single)
{
	struct run run = { .way = way, .max = way->pool / 64 };
	struct figure figure = { "empty", 0 };

	run.held = vmalloc_array(run.max, sizeof(*run.held));
	if (!run.held)
		return -ENOMEM;
	prandom_seed_state(&run.random, 1);

	measure_all(&run, &figure, 1, sizes, ARRAY_SIZE(sizes));
	measure_read(&run, &figure, 1);
	measure_bursts(&run, &figure);
	if (way->pool <= SZ_64M)
		measure_capacity(&run);

	fill(&run, 0);
	for (unsigned int i = 0; i < ARRAY_SIZE(occupancies); i++) {
		figure = (struct figure){ "mixed", occupancies[i] };
		thin(&run, 0, figure.occupancy);
		measure_all(&run, &figure, 1, sizes, ARRAY_SIZE(sizes));
		measure_read(&run, &figure, 1);
		measure_bursts(&run, &figure);
	}
	fill(&run, 0);
	figure.occupancy = 100;
	for (unsigned int i = 0; i < ARRAY_SIZE(refused_sizes); i++) {
		/* Until there is no room for this length either. */
		fill(&run, refused_sizes[i]);
		measure_refusals(&run, &figure, refused_sizes[i]);
	}
	thin(&run, 0, 0);

	for (unsigned int f = 0; single && f < ARRAY_SIZE(fills); f++) {
		fill(&run, fills[f]);
		for (unsigned int i = 0; i < ARRAY_SIZE(occupancies); i++) {
			figure = (struct figure){ "single", occupancies[i] };
			thin(&run, fills[f], figure.occupancy);
			if (fills[f] == 64)
				measure_all(&run, &figure, 1, sizes, 2);
			else
				measure_all(&run, &figure, 1, &fills[f], 1);
		}
		thin(&run, fills[f], 0);
	}
	result_printk("{\"kind\":\"longest\",\"way\":\"%s\",\"pool\":%zu,\"map\":%lld,\"map_len\":%u,\"unmap\":%lld,\"unmap_len\":%u,\"refused\":%llu,\"first_refusal\":%lld}\n",
		      way->name, way->pool, run.longest_map, run.longest_map_len, run.longest_unmap,
		      run.longest_unmap_len, run.refused, run.first_refusal);
	vfree(run.held);
	return 0;
}

static int count_regions(void)
{
	const struct way none = { "none", &none_ops };
	struct run run = { .way = &none };
	struct figure figure = { "empty", 0 };
	int err = calibrate();

	measure(&run, &figure, 1, 1, DMA_TO_DEVICE);
	measure_read(&run, &figure, 1);
	for (unsigned int i = 0; !err && i < devices; i++)
		err = count(&ways[i], true);
	return err;
}

static int count_swiotlb(void)
{
	struct way way = {
		"swiotlb", &dma_ops, ways[0].token, SZ_64M,
	};
	dma_addr_t at;
	int err;

	/* Where a buffer is mapped to itself, nothing bounces. */
	at = map(&way, buffer, SZ_4K, DMA_TO_DEVICE);
	if (at == DMA_MAPPING_ERROR || at == page_to_phys(buffer)) {
		pr_err("the DMA API does not bounce: run the guest with swiotlb=32768,force\n");
		return -EOPNOTSUPP;
	}
	unmap(&way, at, SZ_4K, DMA_TO_DEVICE);
	err = calibrate();
	return err ?: count(&way, false);
}

/* --- scaling --- */

struct worker {
	const struct way *way;
	struct page *page;
	u32 len;		/* 0: a block read */
	struct completion *start;
	atomic_t *stop;
	u64 ops;
	int err;
};

static int work(void *data)
{
	struct worker *worker = data;
	const struct way *way = worker->way;
	u64 ops = 0;

	wait_for_completion(worker->start);
	while (!atomic_read(worker->stop)) {
		for (unsigned int i = 0; i < 64; i++) {
			for (unsigned int p = 0; p < (worker->len ? 1 : PARTS); p++) {
				u32 len = worker->len ?: parts[p].len;
				u32 dir = worker->len ? DMA_FROM_DEVICE : parts[p].dir;
				dma_addr_t at = map(way, worker->page, len, dir);

				if (at == DMA_MAPPING_ERROR)
					worker->err = -ENOMEM;
				else
					unmap(way, at, len, dir);
			}
		}
		ops += 64;
		cond_resched();
	}
	worker->ops = ops;
	while (!kthread_should_stop())
		schedule_timeout_interruptible(1);
	return worker->err;
}

static int scale_once(const struct way *way, u32 len, unsigned int cpus)
{
	struct completion start = COMPLETION_INITIALIZER_ONSTACK(start);
	struct task_struct *tasks[2] = {};
	struct worker workers[2] = {};
	struct way copies[2];
	atomic_t stop = ATOMIC_INIT(0);
	ktime_t begin, end;
	u64 ops = 0;
	int err = 0;

	for (unsigned int i = 0; i < cpus; i++) {
		copies[i] = *way;
		workers[i].way = &copies[i];
		workers[i].page = alloc_pages(GFP_KERNEL, get_order(LARGEST));
		if (way->ops == &copy_ops)
			copies[i].token.group = vmalloc(LARGEST);
		workers[i].len = len;
		workers[i].start = &start;
		workers[i].stop = &stop;
		tasks[i] = kthread_create_on_cpu(work, &workers[i], i, "bench/%u");
		if (IS_ERR(tasks[i]) || !workers[i].page)
			return -ENOMEM;
		wake_up_process(tasks[i]);
	}
	msleep(50);
	begin = ktime_get();
	complete_all(&start);
	msleep(500);
	atomic_set(&stop, 1);
	end = ktime_get();
	for (unsigned int i = 0; i < cpus; i++) {
		err = kthread_stop(tasks[i]) ?: err;
		ops += workers[i].ops;
		__free_pages(workers[i].page, get_order(LARGEST));
		if (way->ops == &copy_ops)
			vfree(copies[i].token.group);
	}
	result_printk("{\"kind\":\"scaling\",\"way\":\"%s\",\"len\":%u,\"cpus\":%u,\"ops\":%llu,\"ns\":%lld}\n",
		      way->name, len, cpus, ops, ktime_to_ns(ktime_sub(end, begin)));
	return err;
}

static int scale(void)
{
	static const u32 works[] = { 64, SZ_4K, 0 };
	const struct way tested[] = {
		ways[0],
		{ "swiotlb", &dma_ops, ways[0].token },
		{ "memcpy", &copy_ops },
	};
	int err = 0;

	if (num_online_cpus() < 2)
		return -EOPNOTSUPP;
	for (unsigned int round = 0; round < ROUNDS; round++)
		for (unsigned int w = 0; w < ARRAY_SIZE(tested); w++)
			for (unsigned int l = 0; l < ARRAY_SIZE(works); l++)
				for (unsigned int cpus = 1; cpus <= 2; cpus++)
					err = scale_once(&tested[w], works[l], cpus) ?: err;
	return err;
}

/* --- a checker on all CPUs --- */

#define HAMMERED	24	/* mappings of one CPU at a time */
#define HAMMER_MS	4000

struct hammer {
	const struct way *way;
	struct rnd_state random;
	unsigned int cpu;
	u64 ops, refused, wrong;
};

struct blow {
	struct page *page;
	dma_addr_t at;
	u32 len;
	u32 dir;
	u8 seed;
};

static u32 hammer_len(struct hammer *hammer)
{
	u32 random = prandom_u32_state(&hammer->random);

	/* half of them small */
	return 1 + (random >> 8) % (random & 1 ? 2048 : LARGEST / 2);
}

static bool filled_with(const u8 *bytes, u8 byte, size_t len)
{
	return !memchr_inv(bytes, byte, len);
}

static void strike(struct hammer *hammer, struct blow *blow)
{
	const struct way *way = hammer->way;
	u8 *bytes = page_address(blow->page);
	u8 *there;
	u8 want;

	if (blow->at == DMA_MAPPING_ERROR) {
		blow->len = hammer_len(hammer);
		blow->dir = prandom_u32_state(&hammer->random) % 3; /* both, to, from */
		blow->seed = prandom_u32_state(&hammer->random);
		memset(bytes, blow->seed, blow->len);
		blow->at = map(way, blow->page, blow->len, blow->dir);
		hammer->refused += blow->at == DMA_MAPPING_ERROR;
		return;
	}
	want = blow->seed;
	there = way->region + (blow->at - way->region_start);
	hammer->wrong += !filled_with(there, want, blow->len);
	/* What comes back is what is in the region, and nothing beside it. */
	bytes[blow->len] = ~blow->seed;
	memset(bytes, ~want, blow->len);
	if (blow->dir != DMA_TO_DEVICE && blow->len > 8)
		way->ops->sync_single_for_cpu(way->token, blow->at + 8, blow->len - 8, blow->dir);
	unmap(way, blow->at, blow->len, blow->dir);
	if (blow->dir != DMA_TO_DEVICE)
		hammer->wrong += !filled_with(bytes, want, blow->len);
	hammer->wrong += bytes[blow->len] != (u8)~blow->seed;
	blow->at = DMA_MAPPING_ERROR;
	hammer->ops++;
}

static int hammer_cpu(void *data)
{
	struct hammer *hammer = data;
	struct blow *blows = kcalloc(HAMMERED, sizeof(*blows), GFP_KERNEL);
	unsigned int made = 0;

	for (; blows && made < HAMMERED; made++) {
		blows[made].at = DMA_MAPPING_ERROR;
		blows[made].page = alloc_pages(GFP_KERNEL, get_order(LARGEST));
		if (!blows[made].page)
			break;
	}
	while (!kthread_should_stop()) {
		for (unsigned int i = 0; made && i < 64; i++)
			strike(hammer, &blows[prandom_u32_state(&hammer->random) % made]);
		cond_resched();
	}
	while (made--) {
		if (blows[made].at != DMA_MAPPING_ERROR)
			strike(hammer, &blows[made]);
		__free_pages(blows[made].page, get_order(LARGEST));
	}
	kfree(blows);
	return 0;
}

static int hammer_device(const struct way *way)
{
	struct hammer *hammers = kcalloc(nr_cpu_ids, sizeof(*hammers), GFP_KERNEL);
	struct task_struct **tasks = kcalloc(nr_cpu_ids, sizeof(*tasks), GFP_KERNEL);
	u64 ops = 0, refused = 0, wrong = 0;
	unsigned int cpu;

	if (!hammers || !tasks) {
		kfree(hammers);
		kfree(tasks);
		return -ENOMEM;
	}
	for_each_online_cpu(cpu) {
		hammers[cpu].way = way;
		hammers[cpu].cpu = cpu;
		prandom_seed_state(&hammers[cpu].random, cpu + 1);
		tasks[cpu] = kthread_create_on_cpu(hammer_cpu, &hammers[cpu], cpu, "hammer/%u");
		if (!IS_ERR(tasks[cpu]))
			wake_up_process(tasks[cpu]);
	}
	msleep(HAMMER_MS);
	for_each_online_cpu(cpu) {
		if (IS_ERR(tasks[cpu]))
			continue;
		kthread_stop(tasks[cpu]);
		ops += hammers[cpu].ops;
		refused += hammers[cpu].refused;
		wrong += hammers[cpu].wrong;
	}
	result_printk("{\"kind\":\"hammer\",\"pool\":%zu,\"cpus\":%u,\"ops\":%llu,\"refused\":%llu,\"wrong\":%llu}\n",
		      way->pool, num_online_cpus(), ops, refused, wrong);
	kfree(hammers);
	kfree(tasks);
	return wrong ? -EIO : 0;
}

static int hammer(void)
{
	int err = 0;

	for (unsigned int i = 0; i < devices; i++)
		err = hammer_device(&ways[i]) ?: err;
	return err;
}

/* --- debugfs --- */

static const struct {
	const char *name;
	int (*run)(void);
} commands[] = {
	{ "region", count_regions },
	{ "swiotlb", count_swiotlb },
	{ "scaling", scale },
	{ "hammer", hammer },
};

static ssize_t run_write(struct file *file, const char __user *user, size_t len, loff_t *at)
{
	char name[16] = {};
	int err = -EINVAL;

	if (len >= sizeof(name))
		return -EINVAL;
	if (copy_from_user(name, user, len))
		return -EFAULT;
	guard(mutex)(&lock);
	if (!devices)
		return -ENODEV;
	results_len = 0;
	for (unsigned int i = 0; i < ARRAY_SIZE(commands); i++)
		if (sysfs_streq(name, commands[i].name))
			err = commands[i].run();
	return err ?: len;
}

static ssize_t results_read(struct file *file, char __user *user, size_t len, loff_t *at)
{
	guard(mutex)(&lock);
	return simple_read_from_buffer(user, len, at, results, results_len);
}

static const struct file_operations run_fops = {
	.owner = THIS_MODULE,
	.write = run_write,
};

static const struct file_operations results_fops = {
	.owner = THIS_MODULE,
	.read = results_read,
};

/* --- the driver --- */

static int bench_probe(struct virtio_device *vdev)
{
	struct pci_dev *pdev;
	struct way *way;

	if (!vdev->map || !dev_is_pci(vdev->dev.parent)) {
		dev_err(&vdev->dev, "not bounced: is virtio_swiotlb loaded?\n");
		return -ENODEV;
	}
	pdev = to_pci_dev(vdev->dev.parent);
	guard(mutex)(&lock);
	if (devices == MAX_DEVICES)
		return -ENOSPC;
	way = &ways[devices];
	*way = (struct way){
		.name = "region",
		.pool = pci_resource_len(pdev, BOUNCE_BAR),
		.ops = vdev->map,
		.token = vdev->vmap,
		.region_start = pci_resource_start(pdev, BOUNCE_BAR),
	};
	way->region = memremap(way->region_start, way->pool, MEMREMAP_WB);
	if (!way->region)
		return -ENOMEM;
	devices++;
	return 0;
}

/* Devices go with the driver only: the runner sees to that. */
static void bench_remove(struct virtio_device *vdev)
{
	for (unsigned int i = 0; i < devices; i++)
		if (ways[i].token.dma_dev == vdev->dev.parent)
			memunmap(ways[i].region);
	virtio_reset_device(vdev);
}

static const struct virtio_device_id ids[] = {
	{ BENCH_ID, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static struct virtio_driver bench_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.suppress_bind_attrs = true,
	.id_table = ids,
	.probe = bench_probe,
	.remove = bench_remove,
};

static struct dentry *directory;

static int __init bench_init(void)
{
	int err = -ENOMEM;

	results = vmalloc(RESULTS);
	buffer = alloc_pages(GFP_KERNEL, get_order(LARGEST));
	other_buffer = alloc_pages(GFP_KERNEL, get_order(LARGEST));
	if (results && buffer && other_buffer)
		err = register_virtio_driver(&bench_driver);
	if (err) {
		if (buffer)
			__free_pages(buffer, get_order(LARGEST));
		if (other_buffer)
			__free_pages(other_buffer, get_order(LARGEST));
		vfree(results);
		return err;
	}
	directory = debugfs_create_dir(KBUILD_MODNAME, NULL);
	debugfs_create_file("run", 0200, directory, NULL, &run_fops);
	debugfs_create_file("results", 0400, directory, NULL, &results_fops);
	return 0;
}

static void __exit bench_exit(void)
{
	debugfs_remove(directory);
	unregister_virtio_driver(&bench_driver);
	__free_pages(buffer, get_order(LARGEST));
	__free_pages(other_buffer, get_order(LARGEST));
	vfree(results);
}

module_init(bench_init);
module_exit(bench_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Measures virtio_swiotlb and kernel/dma/swiotlb.c");
