// SPDX-License-Identifier: GPL-2.0

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cc_platform.h>
#include <linux/device.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/pgtable.h>
#include <linux/rcupdate.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include <kunit/static_stub.h>

#ifdef CONFIG_X86
#include <asm/memtype.h>
#endif

#include "helpers.h"

void virtio_swiotlb_device_lock(struct device *dev)
{
	device_lock(dev);
}

int virtio_swiotlb_device_lock_interruptible(struct device *dev)
{
	return device_lock_interruptible(dev);
}

void virtio_swiotlb_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

struct resource *virtio_swiotlb_pci_resource(struct pci_dev *pdev, int bar)
{
	return pci_resource_n(pdev, bar);
}

pci_bus_addr_t virtio_swiotlb_pci_bus_address(struct pci_dev *pdev, int bar)
{
	return pci_bus_address(pdev, bar);
}

phys_addr_t virtio_swiotlb_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

void virtio_swiotlb_copy_in(void *to, phys_addr_t from, size_t len)
{
	memcpy(to, phys_to_virt(from), len);
}

void virtio_swiotlb_copy_out(phys_addr_t to, const void *from, size_t len)
{
	memcpy(phys_to_virt(to), from, len);
}

void virtio_swiotlb_clear(void *to, size_t len)
{
	memset(to, 0, len);
}

bool virtio_swiotlb_memory_encrypted(void)
{
	KUNIT_STATIC_STUB_REDIRECT(virtio_swiotlb_memory_encrypted);
	return cc_platform_has(CC_ATTR_MEM_ENCRYPT);
}

/*
 * How the CPU caches memory that memremap(MEMREMAP_WB) has mapped at @base. x86 maps it UC- if a
 * variable MTRR declares its addresses uncachable, and does not report that to the caller.
 * mtrr_type_lookup() is not exported, so this reads the page table. With the PAT disabled the page
 * table does not show the MTRR.
 */
const char *virtio_swiotlb_cache_mode(const void *base)
{
#ifdef CONFIG_X86
	/* Without a PAT entry for WC its bits are those of UC-. */
	static const struct {
		enum page_cache_mode mode;
		const char *name;
	} modes[] = {
		{ _PAGE_CACHE_MODE_WB, "wb" },
		{ _PAGE_CACHE_MODE_UC_MINUS, "uc-" },
		{ _PAGE_CACHE_MODE_UC, "uc" },
		{ _PAGE_CACHE_MODE_WC, "wc" },
		{ _PAGE_CACHE_MODE_WT, "wt" },
		{ _PAGE_CACHE_MODE_WP, "wp" },
	};
	unsigned int level, i;
	pteval_t flags;
	pte_t *pte;

	pte = lookup_address((unsigned long)base, &level);
	if (!pte || !pat_enabled())
		return "unknown";
	flags = pte_flags(*pte);
	if (level != PG_LEVEL_4K)
		flags = protval_large_2_4k(flags);
	for (i = 0; i < ARRAY_SIZE(modes); i++)
		if (cachemode2protval(modes[i].mode) == (flags & _PAGE_CACHE_MASK))
			return modes[i].name;
	return "unknown";
#else
	return "wb";
#endif
}

unsigned int virtio_swiotlb_online_cpus(void)
{
	return num_online_cpus();
}

unsigned int virtio_swiotlb_cpu(void)
{
	return raw_smp_processor_id();
}

unsigned long virtio_swiotlb_lock(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool virtio_swiotlb_trylock(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void virtio_swiotlb_unlock(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

/*
 * In a preemptible kernel without this flavour the function is another one, which does not wait for
 * tasks that were preempted.
 */
#if defined(CONFIG_PREEMPTION) && !defined(CONFIG_TASKS_RCU)
#error "virtio_swiotlb needs CONFIG_TASKS_RCU: turn on KPROBES, BPF_SYSCALL or FUNCTION_TRACER"
#endif

void virtio_swiotlb_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

/*
 * Marks all rings of a device broken. May be called in any context. Returns whether all of them
 * were broken before, and are split rings.
 */
bool virtio_swiotlb_break(struct virtio_device *vdev)
{
	bool broken = !__virtio_test_bit(vdev, VIRTIO_F_RING_PACKED);
	struct virtqueue *vq;
	unsigned long flags;

	/* Only tasks hold this lock; an interrupt may have come while one does. */
	if (!spin_trylock_irqsave(&vdev->vqs_list_lock, flags))
		return false;
	virtio_device_for_each_vq(vdev, vq) {
		broken &= virtqueue_is_broken(vq);
		__virtqueue_break(vq);
	}
	spin_unlock_irqrestore(&vdev->vqs_list_lock, flags);
	return broken;
}

/* The module! macro has no key for the version. */
#ifdef VIRTIO_SWIOTLB_VERSION
MODULE_VERSION(VIRTIO_SWIOTLB_VERSION);
#endif

/* sysfs shows the first three. The others are names of none and all, for a bool. */
static const char * const hint_names[] = {
	[VIRTIO_SWIOTLB_HINT_NONE] = "none",
	[VIRTIO_SWIOTLB_HINT_POOL] = "pool",
	[VIRTIO_SWIOTLB_HINT_ALL] = "all",
	"0", "n", "N", "1", "y", "Y",
};

/* The meanings of the other names. */
static const enum virtio_swiotlb_hint hint_meanings[] = {
	VIRTIO_SWIOTLB_HINT_NONE, VIRTIO_SWIOTLB_HINT_NONE, VIRTIO_SWIOTLB_HINT_NONE,
	VIRTIO_SWIOTLB_HINT_ALL, VIRTIO_SWIOTLB_HINT_ALL, VIRTIO_SWIOTLB_HINT_ALL,
};

#define HINTS	(ARRAY_SIZE(hint_names) - ARRAY_SIZE(hint_meanings))

static enum virtio_swiotlb_hint hint = VIRTIO_SWIOTLB_HINT_POOL;

static int hint_set(const char *value, const struct kernel_param *param)
{
	int found = sysfs_match_string(hint_names, value);

	if (found < 0) {
		pr_err("hint is \"none\" (0, n), \"pool\" or \"all\" (1, y), not \"%s\"\n", value);
		return found;
	}
	hint = found < HINTS ? found : hint_meanings[found - HINTS];
	return 0;
}

static int hint_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%s\n", hint_names[hint]);
}

static const struct kernel_param_ops hint_ops = {
	.set = hint_set,
	.get = hint_get,
};

module_param_cb(hint, &hint_ops, NULL, 0444);
MODULE_PARM_DESC(hint,
		 "Which regions are used that come without the feature bit: \"none\" (0), \"pool\" (none that a capability names), \"all\" (1) (default: pool)");

enum virtio_swiotlb_hint virtio_swiotlb_hint(void)
{
	return hint;
}

static char *pool = "";
module_param(pool, charp, 0444);
MODULE_PARM_DESC(pool,
		 "Memory that the host shares with devices whose firmware names none: START+LENGTH (default: none)");

const char *virtio_swiotlb_pool(void)
{
	return pool;
}

static bool takeover;
module_param(takeover, bool, 0444);
MODULE_PARM_DESC(takeover, "Bind drivers of restricted devices anew at load (default: 0)");

bool virtio_swiotlb_takeover(void)
{
	return takeover;
}

static bool require;
module_param(require, bool, 0444);
MODULE_PARM_DESC(require, "Bind no virtio device that is not bounced (default: 0)");

bool virtio_swiotlb_require(void)
{
	return require;
}

/* VIRTIO_F_DMB is not assigned: bits without another meaning. */
#define DMB_FIRST 43
#define DMB_LAST 49

static unsigned int dmb;

static int dmb_set(const char *value, const struct kernel_param *param)
{
	unsigned int bit;
	int error = kstrtouint(value, 0, &bit);

	if (error || (bit && (bit < DMB_FIRST || bit > DMB_LAST))) {
		pr_err("dmb is 0 (off), or the number of a feature bit from %u to %u, not \"%s\"\n",
		       DMB_FIRST, DMB_LAST, value);
		return -EINVAL;
	}
	dmb = bit;
	return 0;
}

static const struct kernel_param_ops dmb_ops = {
	.set = dmb_set,
	.get = param_get_uint,
};

module_param_cb(dmb, &dmb_ops, &dmb, 0444);
MODULE_PARM_DESC(dmb,
		 "Feature bit that is VIRTIO_F_DMB, 44 in its series (default: 0, none)");

unsigned int virtio_swiotlb_dmb(void)
{
	return dmb;
}

static char *except = "";
module_param(except, charp, 0444);
MODULE_PARM_DESC(except,
		 "Device types that require=1 leaves alone: names or numbers, with commas (default: none)");

const char *virtio_swiotlb_except(void)
{
	return except;
}

static char *types = "";
module_param(types, charp, 0444);
MODULE_PARM_DESC(types,
		 "Device types to bounce though their drivers were never tried: names or numbers, with commas (default: none)");

const char *virtio_swiotlb_types(void)
{
	return types;
}

static bool packed_disks;
module_param(packed_disks, bool, 0444);
MODULE_PARM_DESC(packed_disks,
		 "Let disks use packed rings, with which a full region is an I/O error (default: 0)");

bool virtio_swiotlb_packed_disks(void)
{
	return packed_disks;
}

static const char * const from_device_names[] = {
	[VIRTIO_SWIOTLB_AUTO] = "auto",
	[VIRTIO_SWIOTLB_PRESERVE] = "preserve",
	[VIRTIO_SWIOTLB_CLEAR] = "clear",
};

static enum virtio_swiotlb_from_device from_device = VIRTIO_SWIOTLB_AUTO;

static int from_device_set(const char *value, const struct kernel_param *param)
{
	int found = sysfs_match_string(from_device_names, value);

	if (found < 0) {
		pr_err("from_device is \"auto\", \"preserve\" or \"clear\", not \"%s\"\n", value);
		return found;
	}
	from_device = found;
	return 0;
}

static int from_device_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%s\n", from_device_names[from_device]);
}

static const struct kernel_param_ops from_device_ops = {
	.set = from_device_set,
	.get = from_device_get,
};

module_param_cb(from_device, &from_device_ops, NULL, 0444);
MODULE_PARM_DESC(from_device,
		 "What is in the region where the device is to write: \"preserve\" puts there what the buffer has, \"clear\" zeroes, \"auto\" zeroes from 512 bytes on (default: auto)");

enum virtio_swiotlb_from_device virtio_swiotlb_from_device(void)
{
	return from_device;
}
