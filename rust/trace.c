// SPDX-License-Identifier: GPL-2.0
/*
 * The tracepoints, and a function for each that Rust can call: those of the kernel are inline.
 */

#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

void virtio_swiotlb_trace_map(struct device *dev, phys_addr_t phys_addr, dma_addr_t dma_addr,
			      size_t size, unsigned int dir, size_t used_bytes)
{
	trace_virtio_swiotlb_map(dev, phys_addr, dma_addr, size, dir, used_bytes);
}

void virtio_swiotlb_trace_unmap(struct device *dev, dma_addr_t dma_addr, size_t size,
				unsigned int dir)
{
	trace_virtio_swiotlb_unmap(dev, dma_addr, size, dir);
}

void virtio_swiotlb_trace_sync(struct device *dev, dma_addr_t dma_addr, size_t size,
			       unsigned int dir, bool for_cpu)
{
	trace_virtio_swiotlb_sync(dev, dma_addr, size, dir, for_cpu);
}

void virtio_swiotlb_trace_full(struct device *dev, size_t size, size_t pool_bytes,
			       size_t used_bytes)
{
	trace_virtio_swiotlb_full(dev, size, pool_bytes, used_bytes);
}

void virtio_swiotlb_trace_too_large(struct device *dev, size_t size, size_t region_bytes,
				    size_t largest_bytes)
{
	trace_virtio_swiotlb_too_large(dev, size, region_bytes, largest_bytes);
}

void virtio_swiotlb_trace_bad_handle(struct device *dev, dma_addr_t dma_addr, size_t size,
				     enum virtio_swiotlb_bad_handle why)
{
	trace_virtio_swiotlb_bad_handle(dev, dma_addr, size, why);
}

void virtio_swiotlb_trace_negotiated(struct device *dev,
				     const struct virtio_swiotlb_outcome *outcome)
{
	trace_virtio_swiotlb_negotiated(dev, outcome);
}

void virtio_swiotlb_trace_lend(struct device *dev, phys_addr_t phys_addr, u64 size)
{
	trace_virtio_swiotlb_lend(dev, phys_addr, size);
}
