"""A frozen copy of the model as it was loaded."""

import copy

from ftcore import hookimpl, plugin


@plugin(api=1)
class Teacher:
    """Keep the pretrained model beside the one that is trained."""

    @hookimpl(wrapper=True)
    def load_model(self):
        model = yield
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        return model
