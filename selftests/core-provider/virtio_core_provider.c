// SPDX-License-Identifier: GPL-2.0
/*
 * The smallest provider of VIRTIO_F_SWIOTLB, for a kernel with patches/core.
 *
 * It allocates whole pages of the region, first fit, and copies each buffer as
 * a whole. Its counters are read in /sys/module/virtio_core_provider/parameters.
 */

#include <linux/bitmap.h>
#include <linux/dma-mapping.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_swiotlb.h>

/* Shorter than the queues of the reference device. */
#define MAX_RING	40
#define MAX_MAPPING	SZ_64K

static unsigned int accepted, restored, released;
module_param(accepted, uint, 0444);
module_param(restored, uint, 0444);
module_param(released, uint, 0444);

/* The region of a device. */
struct area {
	/* Protects used. */
	spinlock_t lock;
	void *base;
	dma_addr_t bus;
	unsigned long pages;
	unsigned long *used;
	/* Of each page in a mapping, the bytes that it stands for. */
	void **original;
};

static unsigned long pages_of(size_t size)
{
	return PAGE_ALIGN(size) >> PAGE_SHIFT;
}

/* Returns the first of enough pages, or area->pages. */
static unsigned long take(struct area *area, size_t size)
{
	unsigned long first, flags;

	spin_lock_irqsave(&area->lock, flags);
	first = bitmap_find_next_zero_area(area->used, area->pages, 0,
					   pages_of(size), 0);
	if (first < area->pages)
		bitmap_set(area->used, first, pages_of(size));
	else
		first = area->pages;
	spin_unlock_irqrestore(&area->lock, flags);
	return first;
}

static void give_back(struct area *area, dma_addr_t handle, size_t size)
{
	unsigned long flags;

	spin_lock_irqsave(&area->lock, flags);
	bitmap_clear(area->used, (handle - area->bus) >> PAGE_SHIFT,
		     pages_of(size));
	spin_unlock_irqrestore(&area->lock, flags);
}

static void copy_out(struct area *area, dma_addr_t handle, size_t size)
{
	size_t at = handle - area->bus;

	memcpy(area->original[at >> PAGE_SHIFT] + offset_in_page(at),
	       area->base + at, size);
}

static void copy_in(struct area *area, dma_addr_t handle, size_t size)
{
	size_t at = handle - area->bus;

	memcpy(area->base + at,
	       area->original[at >> PAGE_SHIFT] + offset_in_page(at), size);
}

static dma_addr_t map_page(union virtio_map map, struct page *page,
			   unsigned long offset, size_t size,
			   enum dma_data_direction dir, unsigned long attrs)
{
	struct area *area = map.swiotlb;
	unsigned long first = take(area, size);
	dma_addr_t handle;
	unsigned long i;

	if (first == area->pages)
		return DMA_MAPPING_ERROR;
	for (i = 0; i < pages_of(size); i++)
		area->original[first + i] = page_address(page) + offset +
					    (i << PAGE_SHIFT);
	handle = area->bus + (first << PAGE_SHIFT);
	/* Or what the device does not write would be copied out. */
	copy_in(area, handle, size);
	return handle;
}

static void unmap_page(union virtio_map map, dma_addr_t handle, size_t size,
		       enum dma_data_direction dir, unsigned long attrs)
{
	struct area *area = map.swiotlb;

	if (dir != DMA_TO_DEVICE && !(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		copy_out(area, handle, size);
	give_back(area, handle, size);
}

static void sync_for_cpu(union virtio_map map, dma_addr_t handle, size_t size,
			 enum dma_data_direction dir)
{
	if (dir != DMA_TO_DEVICE)
		copy_out(map.swiotlb, handle, size);
}

static void sync_for_device(union virtio_map map, dma_addr_t handle,
			    size_t size, enum dma_data_direction dir)
{
	if (dir != DMA_FROM_DEVICE)
		copy_in(map.swiotlb, handle, size);
}

static void *alloc(union virtio_map map, size_t size, dma_addr_t *handle,
		   gfp_t gfp)
{
	struct area *area = map.swiotlb;
	unsigned long first = take(area, size);
	void *at = area->base + (first << PAGE_SHIFT);

	if (first == area->pages)
		return NULL;
	*handle = area->bus + (first << PAGE_SHIFT);
	return memset(at, 0, PAGE_ALIGN(size));
}

static void free(union virtio_map map, size_t size, void *vaddr,
		 dma_addr_t handle, unsigned long attrs)
{
	give_back(map.swiotlb, handle, size);
}

static bool need_sync(union virtio_map map, dma_addr_t handle)
{
	return true;
}

static int mapping_error(union virtio_map map, dma_addr_t handle)
{
	return handle == DMA_MAPPING_ERROR ? -ENOMEM : 0;
}

static size_t max_mapping_size(union virtio_map map)
{
	return MAX_MAPPING;
}

static const struct virtio_map_ops map_ops = {
	.map_page = map_page,
	.unmap_page = unmap_page,
	.sync_single_for_cpu = sync_for_cpu,
	.sync_single_for_device = sync_for_device,
	.alloc = alloc,
	.free = free,
	.need_sync = need_sync,
	.mapping_error = mapping_error,
	.max_mapping_size = max_mapping_size,
};

static void free_area(struct area *area)
{
	if (area->base)
		memunmap(area->base);
	bitmap_free(area->used);
	kvfree(area->original);
	kfree(area);
}

static int accept(struct virtio_device *vdev,
		  const struct virtio_swiotlb_region *region,
		  union virtio_map *map)
{
	resource_size_t start = region->parent->start + region->offset;
	struct area *area;

	if (!PAGE_ALIGNED(start) || !PAGE_ALIGNED(region->len) ||
	    !(region->parent->flags & IORESOURCE_PREFETCH))
		return -EINVAL;
	area = kzalloc_obj(*area);
	if (!area)
		return -ENOMEM;
	spin_lock_init(&area->lock);
	area->bus = region->bus_addr;
	area->pages = region->len >> PAGE_SHIFT;
	area->used = bitmap_zalloc(area->pages, GFP_KERNEL);
	area->original = kvcalloc(area->pages, sizeof(*area->original), GFP_KERNEL);
	area->base = memremap(start, region->len, MEMREMAP_WB);
	if (!area->used || !area->original || !area->base) {
		free_area(area);
		return -ENOMEM;
	}
	map->swiotlb = area;
	accepted++;
	dev_info(&vdev->dev, "region of %pa bytes at %pa\n", &region->len, &start);
	return 0;
}

static void release(struct virtio_device *vdev)
{
	struct area *area = vdev->vmap.swiotlb;

	WARN_ON(!bitmap_empty(area->used, area->pages));
	free_area(area);
	released++;
}

static int restore(struct virtio_device *vdev)
{
	restored++;
	return 0;
}

static unsigned int max_ring(struct virtio_device *vdev, unsigned int index,
			     unsigned int nvqs)
{
	return MAX_RING;
}

static const struct virtio_swiotlb_provider provider = {
	.owner = THIS_MODULE,
	.map_ops = &map_ops,
	.accept = accept,
	.release = release,
	.restored = restore,
	.max_ring = max_ring,
};

static int __init provider_init(void)
{
	return virtio_swiotlb_register_provider(&provider);
}
module_init(provider_init);

static void __exit provider_exit(void)
{
	virtio_swiotlb_unregister_provider(&provider);
}
module_exit(provider_exit);

MODULE_DESCRIPTION("Smallest provider of VIRTIO_F_SWIOTLB");
MODULE_LICENSE("GPL");
