/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C that Rust cannot call: wrappers of static inlines and macros of the kernel, without logic of
 * their own; functions that need C's view of a ring or of firmware; and the module's parameters.
 */
#ifndef _VIRTIO_SWIOTLB_HELPERS_H
#define _VIRTIO_SWIOTLB_HELPERS_H

#include <linux/pci.h>
#include <linux/spinlock_types.h>
#include <linux/tracepoint-defs.h>
#include <linux/types.h>
#include <linux/virtio.h>

/* First content of the region where the device writes, parameter from_device. */
enum virtio_swiotlb_from_device {
	VIRTIO_SWIOTLB_AUTO,
	VIRTIO_SWIOTLB_PRESERVE,
	VIRTIO_SWIOTLB_CLEAR,
};

/* What names a shared pool. */
enum virtio_swiotlb_named_by {
	VIRTIO_SWIOTLB_DEVICETREE,
	VIRTIO_SWIOTLB_ACPI,
};

/* The kernel's use of memory: none, reserved at boot, or other use. */
enum virtio_swiotlb_ram {
	VIRTIO_SWIOTLB_RAM_OUTSIDE,
	VIRTIO_SWIOTLB_RAM_RESERVED,
	VIRTIO_SWIOTLB_RAM_USED,
};

/* Which regions are used without the bit, parameter hint. */
enum virtio_swiotlb_hint {
	VIRTIO_SWIOTLB_HINT_NONE,
	VIRTIO_SWIOTLB_HINT_POOL,
	VIRTIO_SWIOTLB_HINT_ALL,
};

/* What is wrong with a handle. */
enum virtio_swiotlb_bad_handle {
	VIRTIO_SWIOTLB_BAD_OUTSIDE,
	VIRTIO_SWIOTLB_BAD_UNMAPPED,
	VIRTIO_SWIOTLB_BAD_INTERIOR,
	VIRTIO_SWIOTLB_BAD_LENGTH,
};

/* The decision on a device, and its region in bytes. The strings have no NUL. */
struct virtio_swiotlb_outcome {
	const char *decision;
	size_t decision_len;
	const char *source;
	size_t source_len;
	phys_addr_t phys_addr;
	dma_addr_t dma_addr;
	u64 size;
};

void virtio_swiotlb_device_lock(struct device *dev);
int virtio_swiotlb_device_lock_interruptible(struct device *dev);
void virtio_swiotlb_device_unlock(struct device *dev);
struct resource *virtio_swiotlb_pci_resource(struct pci_dev *pdev, int bar);
pci_bus_addr_t virtio_swiotlb_pci_bus_address(struct pci_dev *pdev, int bar);
phys_addr_t virtio_swiotlb_page_to_phys(struct page *page);
void virtio_swiotlb_copy_in(void *to, phys_addr_t from, size_t len);
void virtio_swiotlb_copy_out(phys_addr_t to, const void *from, size_t len);
void virtio_swiotlb_clear(void *to, size_t len);
bool virtio_swiotlb_memory_encrypted(void);
const char *virtio_swiotlb_cache_mode(const void *base);
unsigned int virtio_swiotlb_online_cpus(void);
unsigned int virtio_swiotlb_cpu(void);
unsigned long virtio_swiotlb_lock(spinlock_t *lock);
bool virtio_swiotlb_trylock(spinlock_t *lock, unsigned long *flags);
void virtio_swiotlb_unlock(spinlock_t *lock, unsigned long flags);
void virtio_swiotlb_synchronize_rcu_tasks(void);
bool virtio_swiotlb_break(struct virtio_device *vdev);

struct device *virtio_swiotlb_host_bridge(struct pci_dev *pdev);
int virtio_swiotlb_named_pool(struct device *dev, phys_addr_t *start, u64 *bytes);
enum virtio_swiotlb_ram virtio_swiotlb_ram(phys_addr_t start, u64 bytes);
bool virtio_swiotlb_overlaps_bar(phys_addr_t start, u64 bytes);
bool virtio_swiotlb_behind_iommu(struct device *dev);
dma_addr_t virtio_swiotlb_bus_address(struct device *dev, phys_addr_t phys);
void virtio_swiotlb_wipe(void *base, u64 bytes);
int virtio_swiotlb_share(void *base, u64 bytes);
int virtio_swiotlb_unshare(void *base, u64 bytes);

/* Attributes (sysfs.c). */
struct virtio_swiotlb_attributes;

typedef ssize_t virtio_swiotlb_show_fn(const void *of, unsigned int index, char *to);

struct kobject *virtio_swiotlb_add_directory(const char *name);
struct virtio_swiotlb_attributes *
virtio_swiotlb_add_attributes(struct kobject *parent, const char *name, const char *const *names,
			      unsigned int count, virtio_swiotlb_show_fn *show, const void *of);
void virtio_swiotlb_remove_attributes(struct virtio_swiotlb_attributes *all);

/*
 * Tracepoints (trace.h), whose keys Rust reads before it calls one of the functions below.
 */
DECLARE_TRACEPOINT(virtio_swiotlb_map);
DECLARE_TRACEPOINT(virtio_swiotlb_unmap);
DECLARE_TRACEPOINT(virtio_swiotlb_sync);
DECLARE_TRACEPOINT(virtio_swiotlb_full);
DECLARE_TRACEPOINT(virtio_swiotlb_too_large);

void virtio_swiotlb_trace_map(struct device *dev, phys_addr_t phys_addr, dma_addr_t dma_addr,
			      size_t size, unsigned int dir, size_t used_bytes);
void virtio_swiotlb_trace_unmap(struct device *dev, dma_addr_t dma_addr, size_t size,
				unsigned int dir);
void virtio_swiotlb_trace_sync(struct device *dev, dma_addr_t dma_addr, size_t size,
			       unsigned int dir, bool for_cpu);
void virtio_swiotlb_trace_full(struct device *dev, size_t size, size_t pool_bytes,
			       size_t used_bytes);
void virtio_swiotlb_trace_too_large(struct device *dev, size_t size, size_t region_bytes,
				    size_t largest_bytes);
void virtio_swiotlb_trace_bad_handle(struct device *dev, dma_addr_t dma_addr, size_t size,
				     enum virtio_swiotlb_bad_handle why);
void virtio_swiotlb_trace_negotiated(struct device *dev,
				     const struct virtio_swiotlb_outcome *outcome);
void virtio_swiotlb_trace_lend(struct device *dev, phys_addr_t phys_addr, u64 size);

/*
 * The module's parameters. Parameters of Rust modules can be numbers only, and sysfs does not show
 * them. They do not change after load.
 */
enum virtio_swiotlb_hint virtio_swiotlb_hint(void);
const char *virtio_swiotlb_pool(void);
unsigned int virtio_swiotlb_dmb(void);
bool virtio_swiotlb_takeover(void);
bool virtio_swiotlb_require(void);
const char *virtio_swiotlb_except(void);
const char *virtio_swiotlb_types(void);
bool virtio_swiotlb_packed_disks(void);
enum virtio_swiotlb_from_device virtio_swiotlb_from_device(void);

#endif /* _VIRTIO_SWIOTLB_HELPERS_H */
