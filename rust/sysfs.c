// SPDX-License-Identifier: GPL-2.0
/*
 * Directories of attributes below /sys/module/virtio_swiotlb, whose values come from Rust. No
 * function of the module is called to release one: the directories are the core's, which may use
 * them for a moment after the module has gone.
 */

#include <linux/kobject.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "helpers.h"

struct attribute_of {
	struct kobj_attribute raw;
	struct virtio_swiotlb_attributes *all;
};

struct virtio_swiotlb_attributes {
	struct kobject *directory;
	virtio_swiotlb_show_fn *show;
	const void *of;
	unsigned int count;
	struct attribute_of attributes[] __counted_by(count);
};

/* NULL if there is none. A module that is built in has one that is made when it is first wanted. */
static struct kobject *__ref module_directory(void)
{
#ifndef CONFIG_SYSFS
	return NULL;
#elif defined(MODULE)
	return kobject_get(&THIS_MODULE->mkobj.kobj);
#else
	struct module_kobject *module = lookup_or_create_module_kobject(KBUILD_MODNAME);

	return module ? &module->kobj : NULL;
#endif
}

/* Makes a directory in the module's own. Returns NULL without sysfs, or if there is no memory. */
struct kobject *virtio_swiotlb_add_directory(const char *name)
{
	struct kobject *module = module_directory();
	struct kobject *directory = NULL;

	if (module)
		directory = kobject_create_and_add(name, module);
	kobject_put(module);
	return directory;
}

static ssize_t show(struct kobject *directory, struct kobj_attribute *raw, char *to)
{
	struct attribute_of *attribute = container_of(raw, struct attribute_of, raw);
	struct virtio_swiotlb_attributes *all = attribute->all;

	return all->show(all->of, attribute - all->attributes, to);
}

/*
 * Makes a directory in @parent, with @count attributes that every user may read. Each read calls
 * @show with @of and the index of the attribute in @names. Returns NULL if there is no memory or
 * the name is taken. The strings are kept, @names is not.
 */
struct virtio_swiotlb_attributes *
virtio_swiotlb_add_attributes(struct kobject *parent, const char *name, const char *const *names,
			      unsigned int count, virtio_swiotlb_show_fn *show_fn, const void *of)
{
	struct virtio_swiotlb_attributes *all;

	all = kzalloc(struct_size(all, attributes, count), GFP_KERNEL);
	if (!all)
		return NULL;
	all->count = count;
	all->show = show_fn;
	all->of = of;
	all->directory = kobject_create_and_add(name, parent);
	if (!all->directory)
		goto fail;
	for (unsigned int i = 0; i < count; i++) {
		struct attribute_of *attribute = &all->attributes[i];

		attribute->all = all;
		sysfs_attr_init(&attribute->raw.attr);
		attribute->raw.attr.name = names[i];
		attribute->raw.attr.mode = 0444;
		attribute->raw.show = show;
		if (sysfs_create_file(all->directory, &attribute->raw.attr))
			goto fail;
	}
	return all;
fail:
	virtio_swiotlb_remove_attributes(all);
	return NULL;
}

/* Waits for reads in progress. Attributes that are still open can be read no more. */
void virtio_swiotlb_remove_attributes(struct virtio_swiotlb_attributes *all)
{
	if (all->directory) {
		kobject_del(all->directory);
		kobject_put(all->directory);
	}
	kfree(all);
}
