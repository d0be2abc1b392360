// SPDX-License-Identifier: GPL-2.0
/*
 * Reads from firmware which memory is set aside for devices: the restricted DMA pools of
 * Documentation/devicetree/bindings/reserved-memory, which ACPI can describe in the same words
 * (PRP0001). The kernel uses them only if CONFIG_DMA_RESTRICTED_POOL is set, and then only those of
 * a devicetree.
 *
 * All functions may sleep.
 */

#include <linux/acpi.h>
#include <linux/device.h>
#include <linux/dma-direct.h>
#include <linux/ioport.h>
#include <linux/mm.h>
#include <linux/of.h>
#include <linux/of_address.h>
#include <linux/of_reserved_mem.h>
#include <linux/pci.h>
#include <linux/property.h>
#include <linux/sched.h>
#include <linux/set_memory.h>
#include <linux/sizes.h>
#include <linux/string.h>

#include <kunit/static_stub.h>

#include "helpers.h"

/* The device of the host bridge that @pdev is behind. */
struct device *virtio_swiotlb_host_bridge(struct pci_dev *pdev)
{
	return &pci_find_host_bridge(pdev->bus)->dev;
}

/*
 * The restricted DMA pool that @owner names, which the caller has to put. NULL if it names none,
 * -EEXIST if it names two, -ENODATA if the named node does not exist.
 */
static struct fwnode_handle *pool_of(const struct fwnode_handle *owner)
{
	struct fwnode_handle *found = NULL, *node;
	unsigned int i;

	for (i = 0; ; i++) {
		node = fwnode_find_reference(owner, "memory-region", i);
		if (!node || PTR_ERR(node) == -ENOENT)
			return found;
		if (IS_ERR(node)) {
			fwnode_handle_put(found);
			return ERR_PTR(-ENODATA);
		}
		if (!fwnode_device_is_compatible(node, "restricted-dma-pool")) {
			fwnode_handle_put(node);
			continue;
		}
		if (found) {
			fwnode_handle_put(node);
			fwnode_handle_put(found);
			return ERR_PTR(-EEXIST);
		}
		found = node;
	}
}

/* The same for @dev, which ACPI may have described though it has a node of a devicetree. */
static struct fwnode_handle *named_pool(struct device *dev)
{
	struct fwnode_handle *first = dev_fwnode(dev), *node = NULL;

	if (first)
		node = pool_of(first);
	if (!node && dev->fwnode && dev->fwnode != first)
		node = pool_of(dev->fwnode);
	return node;
}

/* The only range of memory in _CRS. */
static int acpi_range(struct acpi_device *adev, phys_addr_t *start, u64 *bytes)
{
#ifdef CONFIG_ACPI
	struct resource_entry *entry;
	LIST_HEAD(list);
	int count = acpi_dev_get_memory_resources(adev, &list);

	list_for_each_entry(entry, &list, node) {
		*start = entry->res->start;
		*bytes = resource_size(entry->res);
	}
	acpi_dev_free_resource_list(&list);
	return count == 1 ? VIRTIO_SWIOTLB_ACPI : -ENODATA;
#else
	return -ENODATA;
#endif
}

/*
 * The restricted DMA pool that @dev names by memory-region. Returns what names it. -ENOENT if @dev
 * names none, -EEXIST if it names two, -ENODATA if there is no such range of memory, and -EBUSY if
 * the kernel uses it.
 */
int virtio_swiotlb_named_pool(struct device *dev, phys_addr_t *start, u64 *bytes)
{
	struct fwnode_handle *node = named_pool(dev);
	int ret = -ENODATA;

	if (IS_ERR_OR_NULL(node))
		return node ? PTR_ERR(node) : -ENOENT;
	if (!fwnode_device_is_available(node)) {
		/* A disabled device may have an unset range. */
		ret = -ENODATA;
	} else if (is_of_node(node)) {
		/* Only memory that the kernel reserved at boot is found. */
		struct reserved_mem *rmem = of_reserved_mem_lookup(to_of_node(node));

		/* Of several ranges the kernel keeps one. */
		if (rmem && of_address_count(to_of_node(node)) <= 1) {
			*start = rmem->base;
			*bytes = rmem->size;
			ret = rmem->ops ? -EBUSY : VIRTIO_SWIOTLB_DEVICETREE;
		}
	} else if (is_acpi_device_node(node)) {
		ret = acpi_range(to_acpi_device_node(node), start, bytes);
	}
	fwnode_handle_put(node);
	return ret;
}

static int add_size(struct resource *res, void *sum)
{
	*(u64 *)sum += resource_size(res);
	return 0;
}

/* The kernel's use of a range of memory. */
enum virtio_swiotlb_ram virtio_swiotlb_ram(phys_addr_t start, u64 bytes)
{
	unsigned long pfn, end = PHYS_PFN(start + bytes);
	u64 ram = 0;

	switch (region_intersects(start, bytes, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE)) {
	case REGION_DISJOINT:
		return VIRTIO_SWIOTLB_RAM_OUTSIDE;
	case REGION_MIXED:
		return VIRTIO_SWIOTLB_RAM_USED;
	}
	/* Pages in a hole of RAM are reserved as well, and have no memory. */
	walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY,
			    start, start + bytes - 1, &ram, add_size);
	if (ram != bytes)
		return VIRTIO_SWIOTLB_RAM_USED;
	for (pfn = PHYS_PFN(start); pfn < end; pfn++) {
		if (!pfn_valid(pfn) || !PageReserved(pfn_to_page(pfn)))
			return VIRTIO_SWIOTLB_RAM_USED;
		cond_resched();
	}
	return VIRTIO_SWIOTLB_RAM_RESERVED;
}

/* Whether @range is where a device behind @bridge has a BAR, or can be given one. */
static bool is_in_window(struct pci_host_bridge *bridge, struct resource *range)
{
	struct resource_entry *window;

	resource_list_for_each_entry(window, &bridge->windows) {
		/* Without windows of its own the bridge has all addresses. */
		if (window->res != &iomem_resource &&
		    resource_type(window->res) == IORESOURCE_MEM &&
		    resource_overlaps(window->res, range))
			return true;
	}
	return false;
}

static bool is_in_bar(struct pci_dev *pdev, struct resource *range)
{
	struct resource *bar;

	pci_dev_for_each_resource(pdev, bar) {
		if (resource_type(bar) == IORESOURCE_MEM && bar->parent &&
		    resource_overlaps(bar, range))
			return true;
	}
	return false;
}

/* Whether the range overlaps a BAR of a PCI device, or a window of a bridge. */
bool virtio_swiotlb_overlaps_bar(phys_addr_t start, u64 bytes)
{
	struct resource range = DEFINE_RES_MEM(start, bytes);
	struct pci_dev *pdev = NULL;

	/* A device keeps its bridge. */
	for_each_pci_dev(pdev) {
		if (is_in_bar(pdev, &range) ||
		    is_in_window(pci_find_host_bridge(pdev->bus), &range)) {
			pci_dev_put(pdev);
			return true;
		}
	}
	return false;
}

bool virtio_swiotlb_behind_iommu(struct device *dev)
{
	return device_iommu_mapped(dev);
}

/* The address of memory on the bus of @dev, if it is shared with the host. */
dma_addr_t virtio_swiotlb_bus_address(struct device *dev, phys_addr_t phys)
{
	return phys_to_dma_unencrypted(dev, phys);
}

/* Zeroes memory that may be large, and slow. */
void virtio_swiotlb_wipe(void *base, u64 bytes)
{
	while (bytes) {
		size_t some = min_t(u64, bytes, SZ_1M);

		memset(base, 0, some);
		cond_resched();
		base += some;
		bytes -= some;
	}
}

/* Gives the host access to pages of the linear map, where guest memory is encrypted. */
int virtio_swiotlb_share(void *base, u64 bytes)
{
	KUNIT_STATIC_STUB_REDIRECT(virtio_swiotlb_share, base, bytes);
	return set_memory_decrypted((unsigned long)base, bytes >> PAGE_SHIFT);
}

/* Ends the host's access to the pages. */
int virtio_swiotlb_unshare(void *base, u64 bytes)
{
	KUNIT_STATIC_STUB_REDIRECT(virtio_swiotlb_unshare, base, bytes);
	return set_memory_encrypted((unsigned long)base, bytes >> PAGE_SHIFT);
}
