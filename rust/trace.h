/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints. Fields have the names of those in trace/events/dma.h. The names of events begin with
 * that of the module, because the kernel's own iommu:map and iommu:unmap have the short ones.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_swiotlb

#if !defined(_VIRTIO_SWIOTLB_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _VIRTIO_SWIOTLB_TRACE_H

#include <linux/device.h>
#include <linux/dma-direction.h>
#include <linux/tracepoint.h>
#include <linux/types.h>

#include "helpers.h"

TRACE_DEFINE_ENUM(DMA_BIDIRECTIONAL);
TRACE_DEFINE_ENUM(DMA_TO_DEVICE);
TRACE_DEFINE_ENUM(DMA_FROM_DEVICE);
TRACE_DEFINE_ENUM(VIRTIO_SWIOTLB_BAD_OUTSIDE);
TRACE_DEFINE_ENUM(VIRTIO_SWIOTLB_BAD_UNMAPPED);
TRACE_DEFINE_ENUM(VIRTIO_SWIOTLB_BAD_INTERIOR);
TRACE_DEFINE_ENUM(VIRTIO_SWIOTLB_BAD_LENGTH);

#define show_dir(dir) \
	__print_symbolic(dir, \
		{ DMA_BIDIRECTIONAL, "BIDIRECTIONAL" }, \
		{ DMA_TO_DEVICE, "TO_DEVICE" }, \
		{ DMA_FROM_DEVICE, "FROM_DEVICE" })

#define show_bad_handle(why) \
	__print_symbolic(why, \
		{ VIRTIO_SWIOTLB_BAD_OUTSIDE, "OUTSIDE" }, \
		{ VIRTIO_SWIOTLB_BAD_UNMAPPED, "UNMAPPED" }, \
		{ VIRTIO_SWIOTLB_BAD_INTERIOR, "INTERIOR" }, \
		{ VIRTIO_SWIOTLB_BAD_LENGTH, "LENGTH" })

/* A buffer got room in the region, of which used_bytes are in use now. */
TRACE_EVENT(virtio_swiotlb_map,
	TP_PROTO(struct device *dev, phys_addr_t phys_addr, dma_addr_t dma_addr,
		 size_t size, enum dma_data_direction dir, size_t used_bytes),
	TP_ARGS(dev, phys_addr, dma_addr, size, dir, used_bytes),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(u64, phys_addr)
		__field(u64, dma_addr)
		__field(size_t, size)
		__field(enum dma_data_direction, dir)
		__field(size_t, used_bytes)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->phys_addr = phys_addr;
		__entry->dma_addr = dma_addr;
		__entry->size = size;
		__entry->dir = dir;
		__entry->used_bytes = used_bytes;
	),

	TP_printk("%s dir=%s dma_addr=%llx size=%zu phys_addr=%llx used_bytes=%zu",
		  __get_str(device), show_dir(__entry->dir), __entry->dma_addr,
		  __entry->size, __entry->phys_addr, __entry->used_bytes)
);

/* A mapping is about to end. If there is none, bad_handle follows. */
TRACE_EVENT(virtio_swiotlb_unmap,
	TP_PROTO(struct device *dev, dma_addr_t dma_addr, size_t size,
		 enum dma_data_direction dir),
	TP_ARGS(dev, dma_addr, size, dir),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(u64, dma_addr)
		__field(size_t, size)
		__field(enum dma_data_direction, dir)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->dma_addr = dma_addr;
		__entry->size = size;
		__entry->dir = dir;
	),

	TP_printk("%s dir=%s dma_addr=%llx size=%zu",
		  __get_str(device), show_dir(__entry->dir), __entry->dma_addr,
		  __entry->size)
);

/*
 * Part of a mapping is about to be synced for the CPU, or for the device. If there is none,
 * bad_handle follows.
 */
TRACE_EVENT(virtio_swiotlb_sync,
	TP_PROTO(struct device *dev, dma_addr_t dma_addr, size_t size,
		 enum dma_data_direction dir, bool for_cpu),
	TP_ARGS(dev, dma_addr, size, dir, for_cpu),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(u64, dma_addr)
		__field(size_t, size)
		__field(enum dma_data_direction, dir)
		__field(bool, for_cpu)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->dma_addr = dma_addr;
		__entry->size = size;
		__entry->dir = dir;
		__entry->for_cpu = for_cpu;
	),

	TP_printk("%s dir=%s dma_addr=%llx size=%zu for_cpu=%d",
		  __get_str(device), show_dir(__entry->dir), __entry->dma_addr,
		  __entry->size, __entry->for_cpu)
);

/* No room for a mapping or a ring. */
TRACE_EVENT(virtio_swiotlb_full,
	TP_PROTO(struct device *dev, size_t size, size_t pool_bytes, size_t used_bytes),
	TP_ARGS(dev, size, pool_bytes, used_bytes),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(size_t, size)
		__field(size_t, pool_bytes)
		__field(size_t, used_bytes)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->size = size;
		__entry->pool_bytes = pool_bytes;
		__entry->used_bytes = used_bytes;
	),

	TP_printk("%s size=%zu pool_bytes=%zu used_bytes=%zu",
		  __get_str(device), __entry->size, __entry->pool_bytes,
		  __entry->used_bytes)
);

/* A mapping or a ring has a length that no mapping can have. */
TRACE_EVENT(virtio_swiotlb_too_large,
	TP_PROTO(struct device *dev, size_t size, size_t region_bytes, size_t largest_bytes),
	TP_ARGS(dev, size, region_bytes, largest_bytes),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(size_t, size)
		__field(size_t, region_bytes)
		__field(size_t, largest_bytes)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->size = size;
		__entry->region_bytes = region_bytes;
		__entry->largest_bytes = largest_bytes;
	),

	TP_printk("%s size=%zu region_bytes=%zu largest_bytes=%zu",
		  __get_str(device), __entry->size, __entry->region_bytes,
		  __entry->largest_bytes)
);

/* A handle names no mapping, or one of another length. */
TRACE_EVENT(virtio_swiotlb_bad_handle,
	TP_PROTO(struct device *dev, dma_addr_t dma_addr, size_t size,
		 enum virtio_swiotlb_bad_handle why),
	TP_ARGS(dev, dma_addr, size, why),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(u64, dma_addr)
		__field(size_t, size)
		__field(unsigned int, why)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->dma_addr = dma_addr;
		__entry->size = size;
		__entry->why = why;
	),

	TP_printk("%s dma_addr=%llx size=%zu why=%s",
		  __get_str(device), __entry->dma_addr, __entry->size,
		  show_bad_handle(__entry->why))
);

/* The decision on a device, and its region. Without a region all of that is 0, and - for source. */
TRACE_EVENT(virtio_swiotlb_negotiated,
	TP_PROTO(struct device *dev, const struct virtio_swiotlb_outcome *outcome),
	TP_ARGS(dev, outcome),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__string_len(decision, outcome->decision, outcome->decision_len)
		__string_len(source, outcome->source, outcome->source_len)
		__field(u64, phys_addr)
		__field(u64, dma_addr)
		__field(u64, size)
	),

	TP_fast_assign(
		__assign_str(device);
		__assign_str(decision);
		__assign_str(source);
		__entry->phys_addr = outcome->phys_addr;
		__entry->dma_addr = outcome->dma_addr;
		__entry->size = outcome->size;
	),

	TP_printk("%s decision=%s source=%s dma_addr=%llx size=%llu phys_addr=%llx",
		  __get_str(device), __get_str(decision), __get_str(source),
		  __entry->dma_addr, __entry->size, __entry->phys_addr)
);

/* A device got a lease of a shared pool, or a loan beyond it. */
TRACE_EVENT(virtio_swiotlb_lend,
	TP_PROTO(struct device *dev, phys_addr_t phys_addr, u64 size),
	TP_ARGS(dev, phys_addr, size),

	TP_STRUCT__entry(
		__string(device, dev_name(dev))
		__field(u64, phys_addr)
		__field(u64, size)
	),

	TP_fast_assign(
		__assign_str(device);
		__entry->phys_addr = phys_addr;
		__entry->size = size;
	),

	TP_printk("%s size=%llu phys_addr=%llx",
		  __get_str(device), __entry->size, __entry->phys_addr)
);

#endif /* _VIRTIO_SWIOTLB_TRACE_H */

/* This part must be outside protection */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
